//! The second generation's messages (`spec/gpu-memory.md` §4.5): strict, an unknown field is bad.
//!
//! Tags repeat the first generation's with other fields, so a socket speaks one of them only.

use super::message::{WireInt, direction, messages};
use crate::lock::{Grant, LockType};

messages! {
    /// Asks for the lock.
    "handshake_request" HandshakeRequest {
        /// What is wanted.
        lock_type: LockType,
        /// The server that the client was connected to before: nonce and GPU.
        expected_identity: Option<(String, String)>,
    }
    /// The lock is granted.
    "handshake_response" HandshakeResponse {
        /// What is held.
        lock_type: Grant,
        /// Random, one per server process.
        server_nonce: String,
        /// The GPU.
        gpu_uuid: String,
    }
    /// Asks for memory under the client's own name.
    "allocate_request" AllocateRequest {
        /// The client's name for it.
        allocation_id: String,
        /// Exact bytes, a multiple of the granularity.
        aligned_size: WireInt,
    }
    /// It is done.
    "success_response" SuccessResponse {}
    /// Asks for a descriptor.
    "export_request" ExportRequest {
        /// Which.
        allocation_id: String,
    }
    /// A descriptor comes with this frame's first byte.
    "export_response" ExportResponse {}
    /// Gives memory back.
    "free_request" FreeRequest {
        /// Which.
        allocation_id: String,
    }
    /// Asks about all allocations.
    "list_allocations_request" ListAllocationsRequest {}
    /// All allocations.
    "list_allocations_response" ListAllocationsResponse {
        /// Them.
        allocations: Vec<AllocationEntry>,
    }
    /// One allocation.
    "" AllocationEntry {
        /// The client's name for it.
        allocation_id: String,
        /// Its bytes.
        aligned_size: u64,
    }
    /// Publishes; the session becomes a reader.
    "commit_request" CommitRequest {}
    /// Gives up the writer's work.
    "abort_request" AbortRequest {}
    /// Keeps everybody out while a checkpoint is taken.
    "prepare_checkpoint_request" PrepareCheckpointRequest {}
    /// Asks how a checkpoint stands.
    "get_checkpoint_state_request" GetCheckpointStateRequest {}
    /// Ends a checkpoint that was not taken.
    "abort_checkpoint_request" AbortCheckpointRequest {
        /// Of the checkpoint.
        token: String,
    }
    /// Ends a checkpoint after a restore.
    "complete_restore_request" CompleteRestoreRequest {
        /// Of the checkpoint.
        token: String,
    }
    /// How a checkpoint stands.
    "checkpoint_state_response" CheckpointStateResponse {
        /// `serving` or `checkpoint_ready`.
        state: String,
        /// Of the checkpoint.
        token: Option<String>,
    }
    /// The request was not done.
    "error_response" ErrorResponse {
        /// Why.
        message: String,
        /// Whether memory was short.
        out_of_memory: bool = false,
    }
}

direction! {
    /// What a client sends.
    Request, strict = true, {
        Handshake(HandshakeRequest),
        Allocate(AllocateRequest),
        Export(ExportRequest),
        Free(FreeRequest),
        ListAllocations(ListAllocationsRequest),
        Commit(CommitRequest),
        Abort(AbortRequest),
        PrepareCheckpoint(PrepareCheckpointRequest),
        CheckpointState(GetCheckpointStateRequest),
        AbortCheckpoint(AbortCheckpointRequest),
        CompleteRestore(CompleteRestoreRequest),
    }
}

direction! {
    /// What a server sends.
    Reply, strict = true, {
        Handshake(HandshakeResponse),
        Success(SuccessResponse),
        Export(ExportResponse),
        ListAllocations(ListAllocationsResponse),
        CheckpointState(CheckpointStateResponse),
        Error(ErrorResponse),
    }
}
