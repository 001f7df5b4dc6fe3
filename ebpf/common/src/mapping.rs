//! Records of the iterators over a process's mappings.

/// Words of [`Head`]: `struct vm_area_struct` has 20 to 32, and its flags are among the first.
pub const HEAD_WORDS: usize = 16;

/// The beginning of the kernel's `struct vm_area_struct`.
pub type Head = [u64; HEAD_WORDS];

/// A mapping and its flags (`VM_*` of `include/linux/mm.h`).
///
/// The library that is loaded into CRIU reads these records, too, as three words each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// Its flags.
    pub flags: u64,
}
