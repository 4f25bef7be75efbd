//! A session of the second generation: the client names its allocations, and a commit turns the
//! writer into a reader.

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::ClientError;
use super::wire::{Dial, Wire};
use crate::lock::{Grant, LockType};
use crate::protocol::v2::{
    AbortCheckpointRequest, AbortRequest, AllocateRequest, AllocationEntry,
    CheckpointStateResponse, CommitRequest, CompleteRestoreRequest, ExportRequest, FreeRequest,
    GetCheckpointStateRequest, HandshakeRequest, ListAllocationsRequest, PrepareCheckpointRequest,
    Reply, Request,
};

/// A held lock.
pub struct SessionV2 {
    wire: Wire,
    grant: Grant,
    identity: (String, String),
}

impl SessionV2 {
    /// Connects and waits for the lock: at most `wait`, none is for ever. `expected` is the
    /// identity of the service that the client was connected to before.
    ///
    /// # Errors
    /// The service cannot be reached or is another one, or the lock was not granted in time.
    pub fn open(
        dial: &Dial,
        lock_type: LockType,
        expected: Option<(String, String)>,
        wait: Option<Duration>,
    ) -> Result<SessionV2, ClientError> {
        let mut wire = Wire::dial(dial)?;
        // This generation has no timeout on the wire: giving up is closing.
        wire.set_patience(wait)?;
        let request = HandshakeRequest {
            lock_type,
            expected_identity: expected,
        };
        let answer = wire.call(&Request::from(request).encode(), Reply::decode);
        let reply = match answer {
            Err(ClientError::NoAnswer) => Err(ClientError::NotGranted { committed: false }),
            answer => answer,
        };
        wire.set_patience(Some(dial.reply_timeout))?;
        match reply?.0 {
            Reply::Handshake(granted) => Ok(SessionV2 {
                wire,
                grant: granted.lock_type,
                identity: (granted.server_nonce, granted.gpu_uuid),
            }),
            other => Err(unexpected(other)),
        }
    }

    /// What is held.
    pub fn grant(&self) -> Grant {
        self.grant
    }

    /// The service's nonce and GPU.
    pub fn identity(&self) -> &(String, String) {
        &self.identity
    }

    /// Makes memory of exactly `aligned_size` bytes under the client's own name.
    ///
    /// # Errors
    /// Not allowed, the name is taken, or the size is no multiple of the granularity.
    pub fn allocate(&mut self, id: &str, aligned_size: u64) -> Result<(), ClientError> {
        let aligned_size = aligned_size.into();
        self.done(AllocateRequest {
            allocation_id: id.to_owned(),
            aligned_size,
        })
    }

    /// A descriptor of an allocation; a reader's maps for reading only.
    ///
    /// # Errors
    /// The allocation is unknown, or the connection failed.
    pub fn export(&mut self, id: &str) -> Result<OwnedFd, ClientError> {
        let request = Request::from(ExportRequest {
            allocation_id: id.to_owned(),
        });
        let (reply, descriptor) = self.wire.call(&request.encode(), Reply::decode)?;
        match reply {
            Reply::Export(_) => descriptor.ok_or(ClientError::NoDescriptor),
            other => Err(unexpected(other)),
        }
    }

    /// Gives an allocation back.
    ///
    /// # Errors
    /// Not allowed, or the allocation is unknown.
    pub fn free(&mut self, id: &str) -> Result<(), ClientError> {
        self.done(FreeRequest {
            allocation_id: id.to_owned(),
        })
    }

    /// All allocations.
    ///
    /// # Errors
    /// The connection failed.
    pub fn allocations(&mut self) -> Result<Vec<AllocationEntry>, ClientError> {
        let request = Request::from(ListAllocationsRequest {});
        match self.wire.call(&request.encode(), Reply::decode)?.0 {
            Reply::ListAllocations(list) => Ok(list.allocations),
            other => Err(unexpected(other)),
        }
    }

    /// Publishes; the session goes on as a reader.
    ///
    /// # Errors
    /// Not allowed, or the connection failed.
    pub fn commit(&mut self) -> Result<(), ClientError> {
        self.done(CommitRequest {})?;
        self.grant = Grant::Ro;
        Ok(())
    }

    /// Gives up the writer's work, and the session.
    ///
    /// # Errors
    /// Not allowed, or the connection failed.
    pub fn abort(mut self) -> Result<(), ClientError> {
        self.done(AbortRequest {})
    }

    fn done(&mut self, request: impl Into<Request>) -> Result<(), ClientError> {
        let frame = request.into().encode();
        match self.wire.call(&frame, Reply::decode)?.0 {
            Reply::Success(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

/// What to do about a checkpoint of the service.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum CheckpointControl {
    /// Keep everybody out.
    Prepare,
    /// Say how it stands.
    Query,
    /// It was not taken.
    Abort(String),
    /// It was taken and restored.
    Complete(String),
}

/// Asks about a checkpoint, on either pool's socket.
///
/// # Errors
/// The service cannot be reached, or the pools are not ready for it.
pub fn checkpoint_control(
    dial: &Dial,
    control: CheckpointControl,
) -> Result<CheckpointStateResponse, ClientError> {
    let request: Request = match control {
        CheckpointControl::Prepare => PrepareCheckpointRequest {}.into(),
        CheckpointControl::Query => GetCheckpointStateRequest {}.into(),
        CheckpointControl::Abort(token) => AbortCheckpointRequest { token }.into(),
        CheckpointControl::Complete(token) => CompleteRestoreRequest { token }.into(),
    };
    match Wire::dial(dial)?.call(&request.encode(), Reply::decode)?.0 {
        Reply::CheckpointState(state) => Ok(state),
        other => Err(unexpected(other)),
    }
}

fn unexpected(reply: Reply) -> ClientError {
    match reply {
        Reply::Error(error) => ClientError::Refused(error.message),
        other => ClientError::Unexpected(other.tag()),
    }
}
