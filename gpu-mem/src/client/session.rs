//! A session of the first generation: open it and the lock is held, drop it and the lock is free.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::ClientError;
use super::wire::{Dial, Wire};
use crate::lock::{Grant, LockType};
use crate::protocol::v1::{
    AllocateRequest, AllocateResponse, Bytes, CommitLayoutRequest, CommitRequest, EventRecord,
    ExportAllocationRequest, FreeAllocationRequest, GetAllocationRequest, GetAllocationResponse,
    GetEventHistoryRequest, GetLockStateRequest, GetLockStateResponse, GetMemoryLayoutHashRequest,
    GetRuntimeStateRequest, GetRuntimeStateResponse, HandshakeRequest, ListAllocationsRequest,
    MetadataDeleteRequest, MetadataGetRequest, MetadataListRequest, MetadataPutRequest, Reply,
    Request,
};

/// One allocation, as the service describes it.
pub type AllocationInfo = GetAllocationResponse;

/// The lock's numbers, as the service reports them.
pub type LockState = GetLockStateResponse;

/// A held lock.
pub struct Session {
    wire: Wire,
    grant: Grant,
}

impl Session {
    /// Connects and waits for the lock: at most `wait`, none is for ever.
    ///
    /// # Errors
    /// The service cannot be reached, or the lock was not granted in time.
    pub fn open(
        dial: &Dial,
        lock_type: LockType,
        wait: Option<Duration>,
    ) -> Result<Session, ClientError> {
        let mut wire = Wire::dial(dial)?;
        wire.set_patience(wait.map(|wait| wait.saturating_add(dial.reply_timeout)))?;
        let timeout_ms = wait.map(|wait| wait.as_millis().try_into().unwrap_or(i128::MAX));
        let handshake = Request::from(HandshakeRequest {
            lock_type,
            timeout_ms,
        });
        let (reply, _) = wire.call(&handshake.encode(), Reply::decode)?;
        wire.set_patience(Some(dial.reply_timeout))?;
        match reply {
            Reply::Handshake(answer) => match answer.granted_lock_type {
                Some(grant) if answer.success => Ok(Session { wire, grant }),
                _ => Err(ClientError::NotGranted {
                    committed: answer.committed,
                }),
            },
            other => Err(unexpected(other)),
        }
    }

    /// What is held.
    pub fn grant(&self) -> Grant {
        self.grant
    }

    /// Makes memory of at least `size` bytes.
    ///
    /// # Errors
    /// Not allowed by the grant, out of memory for too long, or the connection failed.
    pub fn allocate(&mut self, size: u64, tag: &str) -> Result<AllocationInfo, ClientError> {
        let request = AllocateRequest {
            size: size.into(),
            tag: tag.to_owned(),
        };
        match self.call(request)? {
            Reply::Allocate(made) => {
                let AllocateResponse {
                    allocation_id,
                    size,
                    aligned_size,
                    layout_slot,
                } = made;
                let tag = tag.to_owned();
                Ok(AllocationInfo {
                    allocation_id,
                    size,
                    aligned_size,
                    tag,
                    layout_slot,
                })
            }
            other => Err(unexpected(other)),
        }
    }

    /// A descriptor of an allocation; a reader's maps for reading only.
    ///
    /// # Errors
    /// The allocation is unknown, or the connection failed.
    pub fn export(&mut self, id: &str) -> Result<OwnedFd, ClientError> {
        let request = ExportAllocationRequest {
            allocation_id: id.to_owned(),
        };
        let (reply, descriptor) = self.call_for(request.into())?;
        match reply {
            Reply::ExportAllocation(_) => descriptor.ok_or(ClientError::NoDescriptor),
            other => Err(unexpected(other)),
        }
    }

    /// Describes one allocation.
    ///
    /// # Errors
    /// The allocation is unknown, or the connection failed.
    pub fn allocation(&mut self, id: &str) -> Result<AllocationInfo, ClientError> {
        match self.call(GetAllocationRequest {
            allocation_id: id.to_owned(),
        })? {
            Reply::GetAllocation(found) => Ok(found),
            other => Err(unexpected(other)),
        }
    }

    /// Describes all allocations, by slot; of one tag only, if one is named.
    ///
    /// # Errors
    /// The connection failed.
    pub fn allocations(&mut self, tag: Option<&str>) -> Result<Vec<AllocationInfo>, ClientError> {
        match self.call(ListAllocationsRequest {
            tag: tag.map(str::to_owned),
        })? {
            Reply::ListAllocations(list) => Ok(list.allocations),
            other => Err(unexpected(other)),
        }
    }

    /// Gives an allocation back, with its metadata. False if there was none.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed.
    pub fn free(&mut self, id: &str) -> Result<bool, ClientError> {
        match self.call(FreeAllocationRequest {
            allocation_id: id.to_owned(),
        })? {
            Reply::FreeAllocation(freed) => Ok(freed.success),
            other => Err(unexpected(other)),
        }
    }

    /// Stores an entry of metadata.
    ///
    /// # Errors
    /// The allocation is unknown, the offset outside it, or not allowed by the grant.
    pub fn put(
        &mut self,
        key: &str,
        id: &str,
        offset_bytes: u64,
        value: &[u8],
    ) -> Result<(), ClientError> {
        let request = MetadataPutRequest {
            key: key.to_owned(),
            allocation_id: id.to_owned(),
            offset_bytes: offset_bytes.into(),
            value: Bytes(value.to_owned()),
        };
        match self.call(request)? {
            Reply::MetadataPut(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Finds an entry of metadata: allocation, offset and value.
    ///
    /// # Errors
    /// The connection failed.
    pub fn get(&mut self, key: &str) -> Result<Option<(String, u64, Vec<u8>)>, ClientError> {
        match self.call(MetadataGetRequest {
            key: key.to_owned(),
        })? {
            Reply::MetadataGet(got) => Ok(match (got.allocation_id, got.offset_bytes, got.value) {
                (Some(id), Some(offset), Some(value)) if got.found => Some((id, offset, value.0)),
                _ => None,
            }),
            other => Err(unexpected(other)),
        }
    }

    /// Removes an entry of metadata. False if there was none.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed.
    pub fn delete(&mut self, key: &str) -> Result<bool, ClientError> {
        match self.call(MetadataDeleteRequest {
            key: key.to_owned(),
        })? {
            Reply::MetadataDelete(done) => Ok(done.deleted),
            other => Err(unexpected(other)),
        }
    }

    /// All keys of metadata that start with `prefix`, sorted.
    ///
    /// # Errors
    /// The connection failed.
    pub fn keys(&mut self, prefix: &str) -> Result<Vec<String>, ClientError> {
        match self.call(MetadataListRequest {
            prefix: prefix.to_owned(),
        })? {
            Reply::MetadataList(list) => Ok(list.keys),
            other => Err(unexpected(other)),
        }
    }

    /// The layout hash; empty until something is committed.
    ///
    /// # Errors
    /// The connection failed.
    pub fn layout_hash(&mut self) -> Result<String, ClientError> {
        match self.call(GetMemoryLayoutHashRequest {})? {
            Reply::LayoutHash(hash) => Ok(hash.memory_layout_hash),
            other => Err(unexpected(other)),
        }
    }

    /// The lock's numbers.
    ///
    /// # Errors
    /// The connection failed.
    pub fn lock_state(&mut self) -> Result<LockState, ClientError> {
        match self.call(GetLockStateRequest {})? {
            Reply::LockState(state) => Ok(state),
            other => Err(unexpected(other)),
        }
    }

    /// Publishes; the session ends with it.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed. The work is then lost.
    pub fn commit(mut self) -> Result<(), ClientError> {
        match self.call(CommitRequest {})? {
            Reply::Commit(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    /// Makes the layout durable; the session goes on with the grant `rw_data`. Answers the hash.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed.
    pub fn commit_layout(&mut self) -> Result<String, ClientError> {
        match self.call(CommitLayoutRequest {})? {
            Reply::CommitLayout(done) => {
                self.grant = done.granted_lock_type.unwrap_or(Grant::RwData);
                Ok(done.memory_layout_hash)
            }
            other => Err(unexpected(other)),
        }
    }

    pub(super) fn call(&mut self, request: impl Into<Request>) -> Result<Reply, ClientError> {
        Ok(self.call_for(request.into())?.0)
    }

    fn call_for(&mut self, request: Request) -> Result<(Reply, Option<OwnedFd>), ClientError> {
        self.wire.call(&request.encode(), Reply::decode)
    }
}

/// How a pool stands, asked from outside.
///
/// # Errors
/// The service cannot be reached.
pub fn runtime_state(dial: &Dial) -> Result<GetRuntimeStateResponse, ClientError> {
    let request = Request::from(GetRuntimeStateRequest {});
    match Wire::dial(dial)?.call(&request.encode(), Reply::decode)?.0 {
        Reply::RuntimeState(state) => Ok(state),
        other => Err(unexpected(other)),
    }
}

/// A pool's last events, oldest first.
///
/// # Errors
/// The service cannot be reached.
pub fn event_history(dial: &Dial) -> Result<Vec<EventRecord>, ClientError> {
    let request = Request::from(GetEventHistoryRequest {});
    match Wire::dial(dial)?.call(&request.encode(), Reply::decode)?.0 {
        Reply::EventHistory(history) => Ok(history.events),
        other => Err(unexpected(other)),
    }
}

/// An answer of the wrong kind: a refusal, or nonsense.
pub(super) fn unexpected(reply: Reply) -> ClientError {
    match reply {
        Reply::Error(error) => ClientError::Refused(error.error),
        other => ClientError::Unexpected(other.tag()),
    }
}
