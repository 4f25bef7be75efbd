//! A session's requests about memory that clients lend each other by CUDA IPC handle
//! ([`crate::ipc`]).

use super::session::unexpected;
use super::wire::{Dial, Wire};
use super::{ClientError, Session};
use crate::ipc::{IpcHandle, Offer};
use crate::protocol::v1::{
    Bytes, IpcEntry, IpcListRequest, IpcOfferRequest, IpcOfferResponse, IpcOpenRequest,
    IpcOpenResponse, IpcStateRequest, IpcStateResponse, IpcWithdrawRequest, Reply, Request,
};

/// Lent memory as the service describes it.
pub type IpcInfo = IpcEntry;

impl Session {
    /// Lends memory of this process's own; it is part of the layout from now on, and must not be
    /// freed until [`ipc_state`] says that it is no more.
    ///
    /// # Errors
    /// Not allowed by the grant, out of range, or the connection failed.
    pub fn offer_ipc(&mut self, offer: &Offer) -> Result<IpcOfferResponse, ClientError> {
        let request = IpcOfferRequest {
            handle: Bytes(offer.handle.0.to_vec()),
            base_bytes: offer.base_bytes.into(),
            offset_bytes: offer.offset_bytes.into(),
            size: offer.size.into(),
            tag: offer.tag.clone(),
            value: Bytes(offer.value.clone()),
        };
        match self.call(request)? {
            Reply::IpcOffer(taken) => Ok(taken),
            other => Err(unexpected(other)),
        }
    }

    /// Takes an offer back. False if there was none.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed.
    pub fn withdraw_ipc(&mut self, id: &str) -> Result<bool, ClientError> {
        let allocation_id = id.to_owned();
        match self.call(IpcWithdrawRequest { allocation_id })? {
            Reply::IpcWithdraw(done) => Ok(done.success),
            other => Err(unexpected(other)),
        }
    }

    /// The handle of lent memory. What it opens must be closed before this session is.
    ///
    /// # Errors
    /// Nothing has this name, its owner has died or is this process, or the connection failed.
    pub fn handle_ipc(&mut self, id: &str) -> Result<(IpcInfo, Offer), ClientError> {
        let allocation_id = id.to_owned();
        let reply = match self.call(IpcOpenRequest { allocation_id })? {
            Reply::IpcOpen(reply) => reply,
            other => return Err(unexpected(other)),
        };
        let IpcOpenResponse {
            entry,
            handle,
            value,
        } = reply;
        let Some(handle) = IpcHandle::from_bytes(&handle.0) else {
            return Err(ClientError::Unexpected("a handle of another length"));
        };
        let offer = Offer {
            handle,
            base_bytes: entry.base_bytes,
            offset_bytes: entry.offset_bytes,
            size: entry.size,
            tag: entry.tag.clone(),
            value: value.0,
        };
        Ok((entry, offer))
    }

    /// What is lent, by slot; of one tag only, if one is named.
    ///
    /// # Errors
    /// The connection failed.
    pub fn ipc_allocations(&mut self, tag: Option<&str>) -> Result<Vec<IpcInfo>, ClientError> {
        let tag = tag.map(str::to_owned);
        match self.call(IpcListRequest { tag })? {
            Reply::IpcList(list) => Ok(list.allocations),
            other => Err(unexpected(other)),
        }
    }
}

/// Whether lent memory is still part of a layout.
///
/// # Errors
/// The service cannot be reached.
pub fn ipc_state(dial: &Dial, id: &str) -> Result<IpcStateResponse, ClientError> {
    let request = Request::from(IpcStateRequest {
        allocation_id: id.to_owned(),
    });
    match Wire::dial(dial)?.call(&request.encode(), Reply::decode)?.0 {
        Reply::IpcState(state) => Ok(state),
        other => Err(unexpected(other)),
    }
}
