//! The memory node that a thread's new memory is taken from.

use std::io;

/// Nodes that the kernel can be built for, at most.
pub const NODES_MAX: u32 = 1024;

/// Pages that this thread touches first come from `node` from now on, as long as it has any.
///
/// # Errors
/// There is no such node, or the process may not choose (a seccomp profile, most likely).
pub fn prefer_node(node: u32) -> io::Result<()> {
    const WORD_BITS: u32 = u64::BITS;
    if node >= NODES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut nodes = [0u64; (NODES_MAX / WORD_BITS) as usize];
    nodes[(node / WORD_BITS) as usize] |= 1 << (node % WORD_BITS);
    // SAFETY: the kernel reads `NODES_MAX` bits of the array, which outlives the call; one more is
    // named because it takes the number for an exclusive bound.
    let done = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            libc::MPOL_PREFERRED,
            nodes.as_ptr(),
            u64::from(NODES_MAX) + 1,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_cannot_be_is_refused() {
        assert!(prefer_node(NODES_MAX).is_err());
        // Node 0 is everywhere; a sandbox may forbid the call, and then nothing has changed.
        let _ = prefer_node(0);
    }
}
