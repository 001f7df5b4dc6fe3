//! What the kernel knows of a process's mappings and shows nowhere without looking at
//! every page of them: their flags. `/proc/PID/smaps` has them beside counts of pages,
//! for which it walks the page tables, 18 ms for each GiB (docs/performance.md).
//!
//! Two iterators (`bpf_iter__task_vma` of `kernel/bpf/task_iter.c`, since Linux 5.12; of one task
//! since 6.1), which write one record for each mapping, in the order of `/proc/PID/maps`:
//!
//! - `heads` writes the first words of the kernel's `struct vm_area_struct`. By mappings
//!   whose flags are known user space learns of it where the flags are.
//! - `flags` writes start, end and flags.

#![no_std]
#![no_main]

use aya_ebpf::bindings::seq_file;
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::helpers::generated::bpf_seq_write;
use migrate_ebpf_common::mapping::{Head, Mapping};

/// Where the flags stand in `struct vm_area_struct`, in bytes; set when `flags` is loaded.
#[unsafe(no_mangle)]
static FLAGS_AT: u32 = 0;

/// `struct bpf_iter__task_vma`.
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    _task: *const c_void,
    /// Null when all have been seen.
    vma: *const Area,
}

/// `struct bpf_iter_meta`; more follows.
#[repr(C)]
struct Meta {
    seq: *mut seq_file,
}

/// `struct vm_area_struct`, which begins so since Linux 2.6; more follows.
#[repr(C)]
struct Area {
    start: u64,
    end: u64,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_vma")]
pub extern "C" fn heads(context: *const Context) -> i32 {
    let Some(vma) = mapping(context) else {
        return 0;
    };
    // SAFETY: a read that fails where nothing is.
    match unsafe { bpf_probe_read_kernel(vma.cast::<Head>()) } {
        Ok(head) => write(context, &head),
        Err(_) => 0,
    }
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_vma")]
pub extern "C" fn flags(context: *const Context) -> i32 {
    let Some(vma) = mapping(context) else {
        return 0;
    };
    // SAFETY: set by user space before the program is loaded, and never after; volatile,
    // for the compiler takes it for the zero above.
    let at = unsafe { (&raw const FLAGS_AT).read_volatile() };
    // SAFETY: reads that fail where nothing is.
    let (area, flags) = unsafe {
        (
            bpf_probe_read_kernel(vma),
            bpf_probe_read_kernel(vma.byte_add(at as usize).cast::<u64>()),
        )
    };
    // A mapping that cannot be read is missing, which whoever reads takes note of.
    let (Ok(area), Ok(flags)) = (area, flags) else {
        return 0;
    };
    let (start, end) = (area.start, area.end);
    write(context, &Mapping { start, end, flags })
}

/// The mapping that this run is about; none when all have been seen.
#[inline(always)]
fn mapping(context: *const Context) -> Option<*const Area> {
    // SAFETY: the context is the kernel's own for this run.
    let vma = unsafe { (*context).vma };
    (!vma.is_null()).then_some(vma)
}

/// Appends a record. One that does not fit the kernel remembers (`seq_has_overflowed`), and
/// shows in the next read.
#[inline(always)]
fn write<T>(context: *const Context, record: &T) -> i32 {
    // SAFETY: the kernel's own sequence for this run, and a record of that size.
    unsafe {
        bpf_seq_write(
            (*(*context).meta).seq,
            (&raw const *record).cast(),
            size_of::<T>() as u32,
        )
    };
    0
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
