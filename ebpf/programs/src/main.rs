//! The gate's tc programs: hooks only. What they decide stands in
//! `migrate-ebpf-common`, where it is tested on the host; here are the maps,
//! the reading of packet bytes, the counting and the verdicts.
//!
//! Four programs, two directions times two kinds of device (with an Ethernet
//! header or without any), share one set of maps, so one store into `CONTROL`
//! opens or closes all interfaces at once.
//!
//! Dropped packets are traced when user space has asked for it at load time;
//! otherwise the verifier finds the level constant and removes the tracing.
//!
//! Verdicts are those of tcx: `TCX_NEXT` and `TCX_DROP` only. Others of the
//! older `TC_ACT_*` family mean "next" there.

#![no_std]
#![no_main]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{bpf_ktime_get_coarse_ns, bpf_skb_load_bytes};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::trace;
use migrate_ebpf_common::{
    Control, Counters, Direction, FlowKey, Judgement, Layer2, ListenerKey, Packet, State, World,
    judge,
};

/// Leave the packet to the next program, and then to the stack.
const TCX_NEXT: i32 = -1;
/// Drop the packet.
const TCX_DROP: i32 = 2;
/// `BPF_F_MMAPABLE`: user space writes the control record without a call.
const MMAPABLE: usize = 1 << 10;

#[btf_map]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();
/// The size is set when the programs are loaded. A plain hash: an LRU would
/// forget flows, and a forgotten flow is an RST sent.
#[btf_map]
static FLOWS: HashMap<FlowKey, u32, 4096> = HashMap::new();
#[btf_map]
static LISTENERS: HashMap<ListenerKey, u32, 4096> = HashMap::new();
#[btf_map]
static STAGED: HashMap<[u8; 16], u32, 256> = HashMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();

#[classifier]
pub fn gate_ingress(ctx: TcContext) -> i32 {
    gate(&ctx, Layer2::Ethernet, Direction::Ingress)
}

#[classifier]
pub fn gate_egress(ctx: TcContext) -> i32 {
    gate(&ctx, Layer2::Ethernet, Direction::Egress)
}

#[classifier]
pub fn gate_ingress_l3(ctx: TcContext) -> i32 {
    gate(&ctx, Layer2::None, Direction::Ingress)
}

#[classifier]
pub fn gate_egress_l3(ctx: TcContext) -> i32 {
    gate(&ctx, Layer2::None, Direction::Egress)
}

#[inline(always)]
fn gate(ctx: &TcContext, layer2: Layer2, direction: Direction) -> i32 {
    // SAFETY: the context pointer is the kernel's own for this run, and these
    // fields of it are readable by a classifier.
    let (mark, protocol_be) = unsafe { ((*ctx.skb.skb).mark, (*ctx.skb.skb).protocol) };
    // The field holds the 16-bit value in network order.
    let ethertype = u16::from_be(protocol_be as u16);
    match judge(&Skb(ctx), layer2, ethertype, mark, direction, &Maps) {
        Judgement::Pass => TCX_NEXT,
        Judgement::PassReset => {
            count(|counters| counters.rst_sent += 1);
            TCX_NEXT
        }
        Judgement::DropStaged => {
            trace!(ctx, "{} of a staged address: dropped", way(direction));
            count(|counters| counters.staged_dropped_packets += 1);
            TCX_DROP
        }
        Judgement::Drop { reset } => {
            let kind = if reset { "RST" } else { "packet" };
            trace!(
                ctx,
                "{} {} of {} bytes: dropped",
                way(direction),
                kind,
                ctx.len()
            );
            count_dropped(ctx, direction, reset);
            TCX_DROP
        }
    }
}

#[inline(always)]
fn way(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "inbound",
        Direction::Egress => "outbound",
    }
}

#[inline(always)]
fn count_dropped(ctx: &TcContext, direction: Direction, reset: bool) {
    // SAFETY: as in `gate`.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let packets = u64::from(if segments == 0 { 1 } else { segments });
    let bytes = u64::from(ctx.len());
    count(|counters| {
        match direction {
            Direction::Ingress => {
                counters.ingress_dropped_packets += packets;
                counters.ingress_dropped_bytes += bytes;
            }
            Direction::Egress => {
                counters.egress_dropped_packets += packets;
                counters.egress_dropped_bytes += bytes;
            }
        }
        if reset {
            counters.rst_dropped += 1;
        }
    });
}

/// Counts on this CPU's own record. An interrupt between load and store may
/// lose a count of the same CPU; `tcx` runs in softirq or with bottom halves
/// off, so there is none that runs these programs.
#[inline(always)]
fn count(change: impl FnOnce(&mut Counters)) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the record is this CPU's own, and nothing else on this CPU
        // runs the programs in between (see above).
        change(unsafe { &mut *counters });
    }
}

/// The packet's bytes, also those that lie outside its linear part.
struct Skb<'a>(&'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        let mut bytes = [0_u8; N];
        // SAFETY: the context is valid for this run, and the buffer is N bytes.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.0.as_ptr(),
                offset as u32,
                bytes.as_mut_ptr().cast::<c_void>(),
                N as u32,
            )
        };
        (result == 0).then_some(bytes)
    }
}

struct Maps;

impl World for Maps {
    #[inline(always)]
    fn state(&self) -> State {
        match CONTROL.get_ptr(0) {
            // SAFETY: the map has this entry for as long as the program
            // lives; user space writes it while we read, one word at a time.
            Some(control) => {
                State(unsafe { core::ptr::read_volatile(&raw const (*control).state) })
            }
            None => State(0),
        }
    }

    #[inline(always)]
    fn deadline_ns(&self) -> u64 {
        match CONTROL.get_ptr(0) {
            // SAFETY: as in `state`.
            Some(control) => unsafe { core::ptr::read_volatile(&raw const (*control).deadline_ns) },
            None => 0,
        }
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn has_flow(&self, key: &FlowKey) -> bool {
        FLOWS.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn has_listener(&self, key: &ListenerKey) -> bool {
        LISTENERS.get_ptr(key).is_some()
    }

    #[inline(always)]
    fn is_staged(&self, address: &[u8; 16]) -> bool {
        STAGED.get_ptr(address).is_some()
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
