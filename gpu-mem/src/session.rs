//! One client of one pool: who it is, where it stands, and what its grant allows.

use crate::history::Peer;
use crate::lock::Grant;
use crate::protocol::v1::Request;

/// Where a session stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Phase {
    /// Connected; the first message decides.
    New,
    /// Waits for the lock; the reply to its handshake is what it waits for.
    Waiting,
    /// Holds the lock.
    Holding,
}

/// One client.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// The process behind it.
    pub peer: Peer,
    /// Where it stands.
    pub phase: Phase,
}

/// What a request needs (`spec/gpu-memory.md` §3.5).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Needs {
    /// Any grant.
    AnyGrant,
    /// The grant `rw`: it changes the shape.
    Rw,
    /// To be the first and only message of its connection.
    BeforeHandshake,
}

/// What a first-generation request needs.
pub fn needs(request: &Request) -> Needs {
    match request {
        Request::Allocate(_)
        | Request::FreeAllocation(_)
        | Request::Free(_)
        | Request::ClearAll(_)
        | Request::MetadataPut(_)
        | Request::MetadataDelete(_)
        | Request::Commit(_)
        | Request::CommitLayout(_)
        | Request::IpcOffer(_)
        | Request::IpcWithdraw(_) => Needs::Rw,
        Request::ExportAllocation(_)
        | Request::Export(_)
        | Request::GetAllocation(_)
        | Request::ListAllocations(_)
        | Request::MetadataGet(_)
        | Request::MetadataList(_)
        | Request::LockState(_)
        | Request::AllocationState(_)
        | Request::LayoutHash(_)
        | Request::IpcOpen(_)
        | Request::IpcList(_) => Needs::AnyGrant,
        Request::Handshake(_)
        | Request::RuntimeState(_)
        | Request::EventHistory(_)
        | Request::IpcState(_) => Needs::BeforeHandshake,
    }
}

/// Whether a grant is enough, else the words of the refusal. Upstream's tests look for
/// "not allowed".
pub fn check(needs: Needs, grant: Grant, tag: &str) -> Result<(), String> {
    match (needs, grant) {
        (Needs::AnyGrant, _) | (Needs::Rw, Grant::Rw) => Ok(()),
        (Needs::Rw, Grant::RwData) => Err(format!(
            "{tag} is not allowed: the layout is committed, reconnect with RW"
        )),
        (Needs::Rw, Grant::Ro) => Err(format!("{tag} is not allowed for a session with grant ro")),
        (Needs::BeforeHandshake, _) => Err(format!(
            "{tag} is not allowed inside a session; open another connection"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rw_changes_the_shape_and_everybody_reads() {
        for grant in [Grant::Rw, Grant::RwData, Grant::Ro] {
            assert!(check(Needs::AnyGrant, grant, "t").is_ok());
            assert_eq!(check(Needs::Rw, grant, "t").is_ok(), grant == Grant::Rw);
            let refused = check(Needs::BeforeHandshake, grant, "t").expect_err("never inside");
            assert!(refused.contains("not allowed"));
        }
    }
}
