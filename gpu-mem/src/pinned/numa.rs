//! Which memory is near a device, and asking the kernel for it.

use std::ffi::c_ulong;
use std::io;
use std::path::Path;

/// The NUMA node of a PCI device (`0000:65:00.0`), from sysfs. None where the machine has no nodes
/// to speak of, or the device is unknown.
pub fn node_of_pci_device(bus_id: &str) -> Option<u32> {
    node_in(Path::new("/sys/bus/pci/devices"), bus_id)
}

fn node_in(devices: &Path, bus_id: &str) -> Option<u32> {
    let plain = |c: char| c.is_ascii_hexdigit() || matches!(c, ':' | '.');
    if bus_id.is_empty() || !bus_id.chars().all(plain) || bus_id.starts_with('.') {
        return None;
    }
    // The driver may write a domain of eight digits; sysfs has four.
    let bus_id = bus_id.to_ascii_lowercase();
    let short = bus_id.strip_prefix("0000").filter(|rest| rest.len() == 12);
    let path = devices.join(short.unwrap_or(&bus_id)).join("numa_node");
    let text = std::fs::read_to_string(path).ok()?;
    // Minus one says that the firmware said nothing.
    text.trim().parse::<u32>().ok()
}

/// Asks that pages of a range come from a node, as long as it has any: call it before the range is
/// touched. For a shared mapping it holds for everybody who maps the same memory.
///
/// # Errors
/// The kernel knows no such node, or no NUMA at all; the memory is as good as without.
pub fn prefer_node(address: usize, bytes: usize, node: u32) -> io::Result<()> {
    let mut nodes = [0 as c_ulong; NODE_WORDS];
    let bits = c_ulong::BITS;
    let Some(word) = nodes.get_mut((node / bits) as usize) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    *word |= 1 << (node % bits);
    // SAFETY: the policy changes where pages come from, never what is in them; the mask has as
    // many bits as are named.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address,
            bytes,
            libc::MPOL_PREFERRED,
            nodes.as_ptr(),
            NODE_WORDS * bits as usize,
            0,
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Room for 1024 nodes, the most that kernels are built for.
const NODE_WORDS: usize = 1024 / c_ulong::BITS as usize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_read_from_sysfs_and_silence_is_no_node() {
        let dir = tempfile::tempdir().expect("a directory");
        let device = |name: &str, node: &str| {
            let device = dir.path().join(name);
            std::fs::create_dir(&device).expect("a directory");
            std::fs::write(device.join("numa_node"), node).expect("a file");
        };
        device("0000:65:00.0", "1\n");
        device("0000:66:00.0", "-1\n");
        device("10000:e1:00.0", "3\n");
        let node = |bus_id| node_in(dir.path(), bus_id);
        assert_eq!(node("0000:65:00.0"), Some(1));
        assert_eq!(
            node("00000000:65:00.0"),
            Some(1),
            "a domain of eight digits"
        );
        assert_eq!(node("10000:E1:00.0"), Some(3));
        assert_eq!(node("0000:66:00.0"), None, "the firmware said nothing");
        for strange in ["0000:67:00.0", "", "../0000:65:00.0", ".", "a/b"] {
            assert_eq!(node(strange), None, "{strange}");
        }
    }

    #[test]
    fn a_node_that_cannot_be_is_an_error() {
        let refused = prefer_node(0, 4096, 4096);
        assert_eq!(
            refused.expect_err("no such node").kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
