//! The eBPF programs, compiled for this machine by this crate's build script, as they are
//! handed to the kernel.

/// The gate's tc programs, of `ebpf/programs/src/gate.rs`.
pub static GATE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/gate.o"));

/// The iterators over a process's mappings, of `ebpf/programs/src/mappings.rs`.
pub static MAPPINGS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/mappings.o"));
