//! What the driver refuses. The stand-in must refuse the same, or what passes on it would fail on a
//! GPU; so every refusal is asked for by hand, on both, and the words are compared.

use std::ffi::c_void;
use std::os::fd::AsRawFd;

use cudarc::driver::sys::{self, CUresult};

use crate::roles::{Stage, say};

const BLOCK: usize = 2 << 20;

/// What must be refused, and how the stand-in says so. A GPU may use another word for it.
const REFUSALS: [(&str, &str); 19] = [
    ("a call before the start", "NOT_INITIALIZED"),
    ("a block of half a granule", "INVALID_VALUE"),
    (
        "a descriptor of a block that is not shared",
        "INVALID_VALUE",
    ),
    ("an import of what is no memory", "INVALID_VALUE"),
    ("a reservation of half a granule", "INVALID_VALUE"),
    ("a mapping over half of a block", "INVALID_VALUE"),
    ("a mapping outside every reservation", "INVALID_VALUE"),
    ("a second mapping at one address", "INVALID_VALUE"),
    ("a handle for what is mapped", "INVALID_VALUE"),
    ("an unmapping of a half", "INVALID_VALUE"),
    (
        "a reservation given back with a mapping in it",
        "INVALID_VALUE",
    ),
    ("a block released twice", "INVALID_VALUE"),
    ("a second unmapping", "INVALID_VALUE"),
    ("legacy memory without a context", "INVALID_CONTEXT"),
    ("legacy memory freed by an inner address", "INVALID_VALUE"),
    ("a handle that is none", "INVALID_HANDLE"),
    ("a close of what is not open", "INVALID_VALUE"),
    ("pinning what is pinned", "HOST_MEMORY_ALREADY_REGISTERED"),
    ("unpinning what is not pinned", "HOST_MEMORY_NOT_REGISTERED"),
];

/// In a child: asks for every refusal and says what came.
pub(crate) fn ask() {
    let mut said = Vec::new();
    let mut count = 0;
    // SAFETY: the pointer is to a live value; here and below the driver checks what it is given.
    said.push(unsafe { sys::cuDeviceGetCount(&raw mut count) });
    // SAFETY: as above.
    assert_eq!(unsafe { sys::cuInit(0) }, CUresult::CUDA_SUCCESS);
    blocks(&mut said);
    legacy(&mut said);
    pinning(&mut said);
    assert_eq!(said.len(), REFUSALS.len());
    for ((what, _), answer) in REFUSALS.iter().zip(said) {
        assert_ne!(answer, CUresult::CUDA_SUCCESS, "{what} is not refused");
        say(&format!("refused: {what}: {answer:?};"));
    }
}

fn properties(shared: bool) -> sys::CUmemAllocationProp {
    // SAFETY: a structure of numbers and pointers, for which zeroes are values.
    let mut properties: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    if shared {
        properties.requestedHandleTypes =
            sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    }
    properties
}

fn block(bytes: usize, shared: bool) -> (CUresult, u64) {
    let (mut handle, properties) = (0, properties(shared));
    // SAFETY: the pointers are to live values.
    let answer = unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) };
    (answer, handle)
}

fn reserved(bytes: usize) -> (CUresult, u64) {
    let mut address = 0;
    // SAFETY: the pointer is to a live value.
    let answer = unsafe { sys::cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0) };
    (answer, address)
}

fn blocks(said: &mut Vec<CUresult>) {
    const FD: sys::CUmemAllocationHandleType =
        sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    said.push(block(BLOCK / 2, true).0);
    let (mine, (made, shared)) = (block(BLOCK, false).1, block(BLOCK, true));
    assert_eq!(made, CUresult::CUDA_SUCCESS);
    let (mut fd, mut imported) = (-1_i32, 0);
    let nothing = std::fs::File::open("/dev/null").expect("it is there");
    // SAFETY: the pointers are to live values; the descriptor is a number by contract.
    unsafe {
        let into = (&raw mut fd).cast::<c_void>();
        said.push(sys::cuMemExportToShareableHandle(into, mine, FD, 0));
        let number = nothing.as_raw_fd() as usize as *mut c_void;
        said.push(sys::cuMemImportFromShareableHandle(
            &raw mut imported,
            number,
            FD,
        ));
    }
    said.push(reserved(BLOCK / 2).0);
    let (made, at) = reserved(2 * BLOCK);
    assert_eq!(made, CUresult::CUDA_SUCCESS);
    let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
    // SAFETY: the range is our own reservation, and nobody uses what is mapped in it.
    unsafe {
        said.push(sys::cuMemMap(at, BLOCK / 2, 0, shared, 0));
        said.push(sys::cuMemMap(at + 64 * BLOCK as u64, BLOCK, 0, shared, 0));
        assert_eq!(
            sys::cuMemMap(at, BLOCK, 0, shared, 0),
            CUresult::CUDA_SUCCESS
        );
        said.push(sys::cuMemMap(at, BLOCK, 0, mine, 0));
        within(|| said.push(sys::cuIpcGetMemHandle(&raw mut handle, at)));
        said.push(sys::cuMemUnmap(at, BLOCK / 2));
        said.push(sys::cuMemAddressFree(at, 2 * BLOCK));
        assert_eq!(sys::cuMemRelease(mine), CUresult::CUDA_SUCCESS);
        said.push(sys::cuMemRelease(mine));
        assert_eq!(sys::cuMemUnmap(at, BLOCK), CUresult::CUDA_SUCCESS);
        said.push(sys::cuMemUnmap(at, BLOCK));
        assert_eq!(sys::cuMemRelease(shared), CUresult::CUDA_SUCCESS);
        assert_eq!(sys::cuMemAddressFree(at, 2 * BLOCK), CUresult::CUDA_SUCCESS);
    }
}

/// Acts in the GPU's context.
fn within(act: impl FnOnce()) {
    let mut context = std::ptr::null_mut();
    // SAFETY: the pointer is to a live value, and the context is retained while it is current.
    unsafe {
        let retained = sys::cuDevicePrimaryCtxRetain(&raw mut context, 0);
        assert_eq!(retained, CUresult::CUDA_SUCCESS);
        sys::cuCtxSetCurrent(context);
        act();
        sys::cuCtxSetCurrent(std::ptr::null_mut());
        sys::cuDevicePrimaryCtxRelease_v2(0);
    }
}

fn legacy(said: &mut Vec<CUresult>) {
    let mut at = 0;
    let none = sys::CUipcMemHandle { reserved: [1; 64] };
    // SAFETY: the pointers are to live values, and what is allocated is used by nobody.
    unsafe {
        said.push(sys::cuMemAlloc_v2(&raw mut at, BLOCK));
        within(|| {
            let made = sys::cuMemAlloc_v2(&raw mut at, BLOCK);
            assert_eq!(made, CUresult::CUDA_SUCCESS);
            said.push(sys::cuMemFree_v2(at + 512));
            let mut opened = 0;
            said.push(sys::cuIpcOpenMemHandle_v2(&raw mut opened, none, 1));
            said.push(sys::cuIpcCloseMemHandle(at));
            assert_eq!(sys::cuMemFree_v2(at), CUresult::CUDA_SUCCESS);
        });
    }
}

fn pinning(said: &mut Vec<CUresult>) {
    let bytes = 4096;
    let pages = vec![0_u8; 3 * bytes];
    let at = (pages.as_ptr() as usize).next_multiple_of(bytes) as *mut c_void;
    // SAFETY: the page lies in a living allocation, which is unpinned before it goes.
    unsafe {
        within(|| {
            let pinned = sys::cuMemHostRegister_v2(at, bytes, 1);
            assert_eq!(pinned, CUresult::CUDA_SUCCESS);
            said.push(sys::cuMemHostRegister_v2(at, bytes, 1));
            assert_eq!(sys::cuMemHostUnregister(at), CUresult::CUDA_SUCCESS);
            said.push(sys::cuMemHostUnregister(at));
        });
    }
}

/// Every refusal is there. On the stand-in in these words; on a GPU in its own, which are printed.
pub(crate) fn refusals(stage: &Stage) {
    let mut role = stage.start("ask", &[]);
    for (what, word) in REFUSALS {
        let line = role.hear("refused: ");
        assert!(line.contains(what), "{what}: {line}");
        let same = line.contains(&format!("CUDA_ERROR_{word};"));
        assert!(same || !stage.has_files(), "not {word}: {line}");
        if !same {
            println!("not as on the stand-in ({word}): {}", line.trim_end());
        }
    }
    role.finish();
}

#[test]
fn the_stand_in_refuses_what_the_driver_refuses() {
    refusals(&Stage::stand_in(&[]));
}
