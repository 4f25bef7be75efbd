//! What the requests about lent memory do, and what becomes of a layout whose owner has died
//! ([`crate::ipc`]).

use super::{BLOCK_BYTES_MAX, Domain, Turn};
use crate::ipc::{Exporter, HANDLE_BYTES, IpcHandle, Offer};
use crate::lock::{ClientId, State};
use crate::protocol::v1::{
    Bytes, IpcListResponse, IpcOfferRequest, IpcOfferResponse, IpcOpenResponse, IpcStateResponse,
    Reply,
};
use crate::stats::Counter;

impl Domain {
    /// A writer lends memory of its own.
    pub(super) fn offer_ipc(
        &mut self,
        client: ClientId,
        request: IpcOfferRequest,
        turn: &mut Turn<'_>,
    ) -> Result<IpcOfferResponse, String> {
        let given = request.handle.0.len();
        let Some(handle) = IpcHandle::from_bytes(&request.handle.0) else {
            return Err(format!(
                "a handle has {HANDLE_BYTES} bytes, not all zero; this one has {given}"
            ));
        };
        let bytes = |number| u64::try_from(number).ok().filter(|n| *n <= BLOCK_BYTES_MAX);
        let numbers = (
            bytes(request.base_bytes),
            bytes(request.offset_bytes),
            bytes(request.size),
        );
        let (Some(base_bytes), Some(offset_bytes), Some(size)) = numbers else {
            return Err("a size or offset is out of range: no device has as much".to_owned());
        };
        let exporter = self.exporter_of(client, turn)?;
        let id = uuid::Uuid::new_v4().to_string();
        let offer = Offer {
            handle,
            base_bytes,
            offset_bytes,
            size,
            tag: request.tag,
            value: request.value.0,
        };
        let slot = self.store.offers_mut().insert(id.clone(), offer, exporter);
        let slot = slot.map_err(|error| error.to_string())?;
        self.stats.count(Counter::IpcOffers);
        Ok(IpcOfferResponse {
            allocation_id: id,
            slot,
            server_nonce: self.config.server_nonce.clone(),
        })
    }

    /// The process behind a session, watched from now on.
    fn exporter_of(&self, client: ClientId, turn: &mut Turn<'_>) -> Result<Exporter, String> {
        let peer = self.sessions.get(&client).map(|session| session.peer);
        let exporter = peer.and_then(|peer| Exporter::watch(client, peer));
        // Alive after the watch began, so the watch is on the process that connected.
        match exporter.filter(|_| (turn.pulse)(client)) {
            Some(exporter) => Ok(exporter),
            None => Err(
                "the service cannot see the process that lends this memory; it must \
                         share the service's pid namespace"
                    .to_owned(),
            ),
        }
    }

    /// A holder of the lock wants to open lent memory.
    pub(super) fn open_ipc(&self, client: ClientId, id: &str) -> Result<IpcOpenResponse, String> {
        let offers = self.store.offers();
        let found = offers.get(id).zip(offers.exporter());
        let Some(((entry, offer), exporter)) = found else {
            return Err(format!("Unknown allocation: {id}"));
        };
        let pid = exporter.peer.pid;
        if !exporter.is_alive() {
            return Err(format!(
                "the memory is lost: process {pid}, which lent it, has ended; release the lock \
                 and ask for rw_or_ro to build it anew"
            ));
        }
        let peer = self.sessions.get(&client).map(|session| session.peer);
        if peer.is_some_and(|peer| peer.pid == pid) {
            self.stats.count(Counter::NotAllowed);
            return Err(
                "not allowed: the process that lends this memory cannot open its own \
                        handle; it has the pointer"
                    .to_owned(),
            );
        }
        self.stats.count(Counter::IpcOpens);
        Ok(IpcOpenResponse {
            entry,
            handle: Bytes(offer.handle.0.to_vec()),
            value: Bytes(offer.value.clone()),
        })
    }

    pub(super) fn list_ipc(&self, tag: Option<&str>) -> IpcListResponse {
        let all = self.store.offers().entries();
        let allocations = all
            .filter(|entry| tag.is_none_or(|tag| tag == entry.tag))
            .collect();
        IpcListResponse { allocations }
    }

    pub(super) fn ipc_state(&self, id: &str) -> Reply {
        let standing = self.lock.standing();
        let held = self.store.offers().get(id).is_some();
        let holders = standing.readers + usize::from(standing.has_writer);
        IpcStateResponse {
            held,
            holders: if held { holders as u64 } else { 0 },
            server_nonce: self.config.server_nonce.clone(),
        }
        .into()
    }

    /// Gives up a layout of lent memory alone whose owner has died, once nobody holds the lock.
    /// Called before anybody is admitted or told how the pool stands, and when a holder leaves.
    /// What the service itself owns is never lost by somebody's death: a layout that has both
    /// stays, and the lent part is refused by name.
    pub(super) fn notice_lost(&mut self, turn: &mut Turn<'_>) {
        let all_lent = self.store.count() == 0;
        let idle = matches!(self.lock.state(), State::Committed | State::LayoutCommitted);
        let Some(exporter) = self.store.offers().exporter().filter(|_| idle && all_lent) else {
            return;
        };
        if exporter.is_alive() {
            return;
        }
        let (session, pid) = (exporter.session, exporter.peer.pid);
        let pool = &self.config.tag;
        tracing::warn!(pool, pid, "a layout is lost with the process that lent it");
        let mut effects = Vec::new();
        self.lock.lose_contents(session, turn.pulse, &mut effects);
        self.apply(effects, turn);
    }
}
