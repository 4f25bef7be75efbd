//! What the first generation's requests do (`spec/gpu-memory.md` §3.5, §3.9, §4.3 to §4.8).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::{Action, Domain, Turn, Wanted, after, aligned};
use crate::history::Kind;
use crate::lock::{ClientId, Grant};
use crate::protocol::v1::{
    AllocateRequest, AllocateResponse, Bytes, ClearAllResponse, CommitLayoutResponse,
    CommitResponse, ErrorResponse, ExportAllocationResponse, FreeAllocationResponse, FreeResponse,
    GetAllocationResponse, GetAllocationStateResponse, GetEventHistoryResponse,
    GetLockStateResponse, GetMemoryLayoutHashResponse, GetRuntimeStateResponse, HandshakeRequest,
    HandshakeResponse, IpcWithdrawResponse, ListAllocationsResponse, MetadataDeleteResponse,
    MetadataGetResponse, MetadataListResponse, MetadataPutRequest, MetadataPutResponse, Reply,
    Request,
};
use crate::session::{Phase, check, needs};
use crate::stats::Counter;
use crate::store::Allocation;

/// What becomes of a request in a session.
enum Answer {
    Reply(Reply),
    ReplyWith(Reply, Arc<OwnedFd>),
    /// It is sent by whoever finishes the work.
    Later,
}

impl<T: Into<Reply>> From<T> for Answer {
    fn from(reply: T) -> Answer {
        Answer::Reply(reply.into())
    }
}

impl Domain {
    pub(super) fn message_v1(&mut self, client: ClientId, payload: &[u8], turn: &mut Turn<'_>) {
        let Some(phase) = self.sessions.get(&client).map(|session| session.phase) else {
            return;
        };
        match (Request::decode(payload), phase) {
            (Ok(request), Phase::New) => self.first_v1(client, request, turn),
            (Ok(request), _) => self.request_v1(client, request, turn),
            (Err(bad), _) => match Reply::decode(payload) {
                // A message, but one that only a server may send.
                Ok(_) if phase == Phase::New => self.expect_handshake(client, turn),
                Ok(reply) => {
                    self.not_allowed(client, format!("{} is not allowed", reply.tag()), turn)
                }
                Err(_) => self.drop_for(client, bad, turn),
            },
        }
    }

    /// The first message decides what the connection is: a lock or a probe.
    fn first_v1(&mut self, client: ClientId, request: Request, turn: &mut Turn<'_>) {
        self.notice_lost(turn);
        match request {
            Request::Handshake(HandshakeRequest {
                lock_type,
                timeout_ms,
            }) => {
                // Zero and less is a try-lock; upstream fails even where the lock is free (H3).
                let deadline_ns = timeout_ms.map(|ms| {
                    let ms = u64::try_from(ms.max(0)).unwrap_or(u64::MAX);
                    after(turn.now_ns, Duration::from_millis(ms))
                });
                self.request(client, lock_type, deadline_ns, turn);
            }
            Request::RuntimeState(_) => {
                turn.send(client, self.runtime_state().encode());
                self.close(client, turn);
            }
            Request::EventHistory(_) => {
                let reply = GetEventHistoryResponse {
                    events: self.history.events(),
                };
                turn.send(client, Reply::from(reply).encode());
                self.close(client, turn);
            }
            Request::IpcState(which) => {
                turn.send(client, self.ipc_state(&which.allocation_id).encode());
                self.close(client, turn);
            }
            _ => self.expect_handshake(client, turn),
        }
    }

    fn expect_handshake(&mut self, client: ClientId, turn: &mut Turn<'_>) {
        turn.send(client, error("Expected HandshakeRequest".into()));
        self.close(client, turn);
    }

    fn not_allowed(&mut self, client: ClientId, text: String, turn: &mut Turn<'_>) {
        self.stats.count(Counter::NotAllowed);
        turn.send(client, error(text));
    }

    /// A request inside a session.
    fn request_v1(&mut self, client: ClientId, request: Request, turn: &mut Turn<'_>) {
        let Some(grant) = self.lock.grant_of(client) else {
            return self.not_allowed(client, "not allowed without the lock".into(), turn);
        };
        if let Err(text) = check(needs(&request), grant, request.tag()) {
            return self.not_allowed(client, text, turn);
        }
        match self.answer_v1(client, request, turn) {
            Ok(Answer::Reply(reply)) => self.reply(client, reply.encode(), turn),
            Ok(Answer::ReplyWith(reply, descriptor)) => turn.actions.push(Action::Send {
                client,
                frame: reply.encode(),
                descriptor: Some(descriptor),
            }),
            Ok(Answer::Later) => {}
            Err(text) => turn.send(client, error(text)),
        }
    }

    fn answer_v1(
        &mut self,
        client: ClientId,
        request: Request,
        turn: &mut Turn<'_>,
    ) -> Result<Answer, String> {
        Ok(match request {
            Request::Allocate(wanted) => return self.allocate_v1(client, wanted, turn),
            Request::FreeAllocation(which) => FreeAllocationResponse {
                success: self.store.free(&which.allocation_id),
            }
            .into(),
            Request::Free(which) => FreeResponse {
                success: self.store.free(&which.allocation_id),
            }
            .into(),
            Request::ClearAll(_) => self.clear_all(client, turn).into(),
            Request::MetadataPut(entry) => self.put_v1(entry)?.into(),
            Request::MetadataDelete(which) => MetadataDeleteResponse {
                deleted: self.store.delete(&which.key),
            }
            .into(),
            Request::Commit(_) => return self.commit_v1(client, turn),
            Request::CommitLayout(_) => self.commit_layout(client, turn)?.into(),
            Request::ExportAllocation(which) => {
                return self.export_v1(client, &which.allocation_id, |it| exported(it).into());
            }
            Request::Export(which) => {
                return self.export_v1(client, &which.allocation_id, |it| described(it).into());
            }
            Request::GetAllocation(which) => described(self.find(&which.allocation_id)?).into(),
            Request::ListAllocations(filter) => {
                let wanted =
                    |found: &&Allocation| filter.tag.as_ref().is_none_or(|t| *t == found.tag);
                let allocations = self
                    .store
                    .allocations()
                    .filter(wanted)
                    .map(described)
                    .collect();
                ListAllocationsResponse { allocations }.into()
            }
            Request::MetadataGet(which) => self.entry_v1(&which.key).into(),
            Request::MetadataList(filter) => {
                let keys = self.store.keys(&filter.prefix).cloned().collect();
                MetadataListResponse { keys }.into()
            }
            Request::LockState(_) => self.lock_state().into(),
            Request::AllocationState(_) => self.allocation_state().into(),
            Request::LayoutHash(_) => GetMemoryLayoutHashResponse {
                memory_layout_hash: self.layout_hash.clone(),
                layout_digest: self.layout_digest.clone().into(),
            }
            .into(),
            Request::IpcOffer(offer) => self.offer_ipc(client, offer, turn)?.into(),
            Request::IpcOpen(which) => self.open_ipc(client, &which.allocation_id)?.into(),
            Request::IpcList(filter) => self.list_ipc(filter.tag.as_deref()).into(),
            Request::IpcWithdraw(which) => IpcWithdrawResponse {
                success: self.store.offers_mut().withdraw(&which.allocation_id),
            }
            .into(),
            Request::Handshake(_)
            | Request::RuntimeState(_)
            | Request::EventHistory(_)
            | Request::IpcState(_) => return Err("not allowed inside a session".into()),
        })
    }

    /// The two dialects' exports differ in their reply only.
    fn export_v1(
        &mut self,
        client: ClientId,
        id: &str,
        reply: impl FnOnce(&Allocation) -> Reply,
    ) -> Result<Answer, String> {
        let descriptor = self.export(client, id)?;
        Ok(Answer::ReplyWith(reply(self.find(id)?), descriptor))
    }

    fn find(&self, id: &str) -> Result<&Allocation, String> {
        self.store.allocation(id).map_err(|error| error.to_string())
    }

    fn allocate_v1(
        &mut self,
        client: ClientId,
        request: AllocateRequest,
        turn: &mut Turn<'_>,
    ) -> Result<Answer, String> {
        if request.size <= 0 {
            return Err(format!("size must be > 0, not {}", request.size));
        }
        let size = u64::try_from(request.size).ok();
        let granularity = self.backend.granularity_bytes();
        let both = size.and_then(|size| Some((size, aligned(size, granularity)?)));
        let Some((size, aligned_size)) = both else {
            return Err(format!(
                "size {} is out of range: no device has as much",
                request.size
            ));
        };
        let id = uuid::Uuid::new_v4().to_string();
        self.store
            .may_insert(&id)
            .map_err(|error| error.to_string())?;
        self.allocate(
            client,
            Wanted {
                id,
                size,
                aligned_size,
                tag: request.tag,
            },
            turn,
        );
        Ok(Answer::Later)
    }

    fn clear_all(&mut self, client: ClientId, turn: &Turn<'_>) -> ClearAllResponse {
        let cleared = self.store.clear();
        let cleared_count = cleared.count();
        self.discarded.push(cleared);
        let (stamp, state) = (self.stamp(client, turn), self.lock.state());
        self.history
            .note(stamp, Kind::AllocationsCleared, state, cleared_count);
        ClearAllResponse { cleared_count }
    }

    fn put_v1(&mut self, entry: MetadataPutRequest) -> Result<MetadataPutResponse, String> {
        let MetadataPutRequest {
            key,
            allocation_id,
            offset_bytes,
            value,
        } = entry;
        self.store
            .put(key, &allocation_id, offset_bytes, value.0)
            .map_err(|error| error.to_string())?;
        Ok(MetadataPutResponse { success: true })
    }

    fn entry_v1(&self, key: &str) -> MetadataGetResponse {
        let entry = self.store.entry(key);
        let allocation = entry.and_then(|entry| self.store.allocation_in(entry.slot));
        MetadataGetResponse {
            found: entry.is_some(),
            allocation_id: allocation.map(|allocation| allocation.id.clone()),
            offset_bytes: entry.map(|entry| entry.offset_bytes),
            value: entry.map(|entry| Bytes(entry.value.clone())),
        }
    }

    /// Publishes and ends the session. The writer hears of it before those whom that lets in.
    fn commit_v1(&mut self, client: ClientId, turn: &mut Turn<'_>) -> Result<Answer, String> {
        let before = turn.actions.len();
        self.commit(client, turn)?;
        let reply = Action::Send {
            client,
            frame: Reply::from(CommitResponse { success: true }).encode(),
            descriptor: None,
        };
        turn.actions.insert(before, reply);
        self.close(client, turn);
        Ok(Answer::Later)
    }

    fn commit_layout(
        &mut self,
        client: ClientId,
        turn: &mut Turn<'_>,
    ) -> Result<CommitLayoutResponse, String> {
        self.check_whole()?;
        let mut effects = Vec::new();
        self.lock
            .commit_layout(client, &mut effects)
            .map_err(|denied| denied.to_string())?;
        self.seal_layout();
        self.apply(effects, turn);
        Ok(CommitLayoutResponse {
            success: true,
            memory_layout_hash: self.layout_hash.clone(),
            granted_lock_type: Some(Grant::RwData),
        })
    }

    fn allocation_state(&self) -> GetAllocationStateResponse {
        GetAllocationStateResponse {
            allocation_count: self.store.count(),
            total_bytes: self.store.total_bytes().into(),
        }
    }

    fn lock_state(&self) -> GetLockStateResponse {
        let standing = self.lock.standing();
        GetLockStateResponse {
            state: standing.state,
            has_rw_session: standing.has_writer,
            ro_session_count: standing.readers as u64,
            waiting_writers: standing.waiting_writers as u64,
            committed: standing.committed,
            is_ready: standing.is_ready(),
            layout_committed: standing.layout_committed.into(),
        }
    }

    fn runtime_state(&self) -> Reply {
        let lock = self.lock_state();
        GetRuntimeStateResponse {
            state: lock.state,
            has_rw_session: lock.has_rw_session,
            ro_session_count: lock.ro_session_count,
            waiting_writers: lock.waiting_writers,
            committed: lock.committed,
            is_ready: lock.is_ready,
            allocation_count: self.store.count(),
            memory_layout_hash: self.layout_hash.clone(),
            layout_committed: lock.layout_committed,
            total_bytes: self.store.total_bytes().into(),
            waiting_clients: (self.lock.standing().waiters as u64).into(),
        }
        .into()
    }
}

fn described(allocation: &Allocation) -> GetAllocationResponse {
    GetAllocationResponse {
        allocation_id: allocation.id.clone(),
        size: allocation.size,
        aligned_size: allocation.aligned_size,
        tag: allocation.tag.clone(),
        layout_slot: allocation.slot.into(),
    }
}

fn exported(allocation: &Allocation) -> ExportAllocationResponse {
    let GetAllocationResponse {
        allocation_id,
        size,
        aligned_size,
        tag,
        layout_slot,
    } = described(allocation);
    ExportAllocationResponse {
        allocation_id,
        size,
        aligned_size,
        tag,
        layout_slot,
    }
}

pub(super) fn allocated(allocation: &Allocation) -> Vec<u8> {
    let GetAllocationResponse {
        allocation_id,
        size,
        aligned_size,
        layout_slot,
        ..
    } = described(allocation);
    Reply::from(AllocateResponse {
        allocation_id,
        size,
        aligned_size,
        layout_slot,
    })
    .encode()
}

pub(super) fn granted(grant: Grant) -> Vec<u8> {
    // `committed` is the value after the grant: a writer unpublishes, a reader reads what is there.
    let committed = grant == Grant::Ro;
    let granted_lock_type = Some(grant);
    Reply::from(HandshakeResponse {
        success: true,
        committed,
        granted_lock_type,
    })
    .encode()
}

pub(super) fn not_granted(committed: bool) -> Vec<u8> {
    let reply = HandshakeResponse {
        success: false,
        committed,
        granted_lock_type: None,
    };
    Reply::from(reply).encode()
}

pub(super) fn error(error: String) -> Vec<u8> {
    Reply::from(ErrorResponse { error, code: 0 }).encode()
}
