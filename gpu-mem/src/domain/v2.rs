//! What the second generation's requests do (`spec/gpu-memory.md` §3.10, §4.5).

use super::{Action, Checkpoint, Domain, Turn, Wanted, aligned};
use crate::lock::{ClientId, Grant};
use crate::protocol::v2::{
    AllocateRequest, AllocationEntry, ErrorResponse, ExportResponse, HandshakeRequest,
    HandshakeResponse, ListAllocationsResponse, Reply, Request, SuccessResponse,
};
use crate::session::Phase;
use crate::stats::Counter;

impl Domain {
    pub(super) fn message_v2(
        &mut self,
        client: ClientId,
        payload: &[u8],
        turn: &mut Turn<'_>,
    ) -> Option<Checkpoint> {
        let phase = self.sessions.get(&client)?.phase;
        let request = match Request::decode(payload) {
            Ok(request) => request,
            Err(bad) => {
                self.drop_for(client, bad, turn);
                return None;
            }
        };
        if phase == Phase::New {
            return self.first_v2(client, request, turn);
        }
        if let Err(text) = self.request_v2(client, request, turn) {
            turn.send(client, error(text, false));
        }
        None
    }

    fn first_v2(
        &mut self,
        client: ClientId,
        request: Request,
        turn: &mut Turn<'_>,
    ) -> Option<Checkpoint> {
        match request {
            Request::Handshake(handshake) => self.handshake_v2(client, handshake, turn),
            Request::PrepareCheckpoint(_) => return Some(Checkpoint::Prepare),
            Request::CheckpointState(_) => return Some(Checkpoint::Query),
            Request::AbortCheckpoint(of) => return Some(Checkpoint::Abort(of.token)),
            Request::CompleteRestore(of) => return Some(Checkpoint::Complete(of.token)),
            other => {
                let text = format!("{} is not allowed before a handshake", other.tag());
                self.refuse_v2(client, text, turn);
            }
        }
        None
    }

    fn handshake_v2(&mut self, client: ClientId, asked: HandshakeRequest, turn: &mut Turn<'_>) {
        let identity = (&self.config.server_nonce, &self.config.gpu_uuid);
        let expected = asked.expected_identity.as_ref();
        if expected.is_some_and(|(nonce, gpu)| (nonce, gpu) != identity) {
            let text = "this is another server or another GPU than before: the memory is gone";
            return self.refuse_v2(client, text.to_owned(), turn);
        }
        self.request(client, asked.lock_type, None, turn);
    }

    fn refuse_v2(&mut self, client: ClientId, text: String, turn: &mut Turn<'_>) {
        turn.send(client, error(text, false));
        self.close(client, turn);
    }

    /// A request inside a session. An error is a reply; the session goes on.
    fn request_v2(
        &mut self,
        client: ClientId,
        request: Request,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let grant = self.lock.grant_of(client);
        let writes = matches!(
            request,
            Request::Allocate(_) | Request::Free(_) | Request::Commit(_) | Request::Abort(_)
        );
        if writes && grant != Some(Grant::Rw) {
            self.stats.count(Counter::NotAllowed);
            return Err(format!(
                "{} is not allowed for a session with grant ro",
                request.tag()
            ));
        }
        match request {
            Request::Allocate(wanted) => self.allocate_v2(client, wanted, turn)?,
            Request::Export(which) => {
                let descriptor = Some(self.export(client, &which.allocation_id)?);
                let frame = Reply::from(ExportResponse {}).encode();
                turn.actions.push(Action::Send {
                    client,
                    frame,
                    descriptor,
                });
            }
            Request::Free(which) => match self.store.free(&which.allocation_id) {
                true => turn.send(client, success()),
                false => return Err(format!("Unknown allocation: {}", which.allocation_id)),
            },
            Request::ListAllocations(_) => self.reply(client, self.list_v2(), turn),
            Request::Commit(_) => {
                self.commit(client, turn)?;
                turn.send(client, success());
            }
            Request::Abort(_) => {
                turn.send(client, success());
                self.close(client, turn);
            }
            other => {
                self.stats.count(Counter::NotAllowed);
                return Err(format!("{} is not allowed inside a session", other.tag()));
            }
        }
        Ok(())
    }

    fn allocate_v2(
        &mut self,
        client: ClientId,
        request: AllocateRequest,
        turn: &mut Turn<'_>,
    ) -> Result<(), String> {
        let AllocateRequest {
            allocation_id: id,
            aligned_size,
        } = request;
        let granularity = self.backend.granularity_bytes();
        let size = u64::try_from(aligned_size).ok().filter(|size| *size > 0);
        let Some(size) = size.filter(|size| aligned(*size, granularity) == Some(*size)) else {
            return Err(format!(
                "size {aligned_size} is no multiple of {granularity} in range"
            ));
        };
        self.store
            .may_insert(&id)
            .map_err(|error| error.to_string())?;
        let tag = self.config.tag.clone();
        self.allocate(
            client,
            Wanted {
                id,
                size,
                aligned_size: size,
                tag,
            },
            turn,
        );
        Ok(())
    }

    fn list_v2(&self) -> Vec<u8> {
        let entry = |allocation: &crate::store::Allocation| AllocationEntry {
            allocation_id: allocation.id.clone(),
            aligned_size: allocation.aligned_size,
        };
        let allocations = self.store.allocations().map(entry).collect();
        Reply::from(ListAllocationsResponse { allocations }).encode()
    }

    pub(super) fn granted_v2(&self, grant: Grant) -> Vec<u8> {
        Reply::from(HandshakeResponse {
            lock_type: grant,
            server_nonce: self.config.server_nonce.clone(),
            gpu_uuid: self.config.gpu_uuid.clone(),
        })
        .encode()
    }
}

pub(super) fn success() -> Vec<u8> {
    Reply::from(SuccessResponse {}).encode()
}

pub(super) fn error(message: String, out_of_memory: bool) -> Vec<u8> {
    Reply::from(ErrorResponse {
        message,
        out_of_memory,
    })
    .encode()
}
