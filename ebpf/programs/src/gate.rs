//! The gate's tc programs: hooks only. What they decide stands in
//! `migrate-ebpf-common`, where it is tested on the host; here are the maps,
//! the reading of packet bytes, the counting and the verdicts.
//!
//! Four programs of the gate, two directions times two kinds of device (with an Ethernet
//! header or without any), share one set of maps, so one store into `CONTROL`
//! opens or closes all interfaces at once.
//!
//! Held packets are moved to a TAP device per interface and direction, found in
//! `ROUTES`; user space reads them there. `gate_return` sits on those devices
//! and moves what user space writes to them to where it was taken: into the
//! receive path of the interface, or out of it. On that way back the packet
//! meets the gate again, which knows it by its mark.
//!
//! Dropped packets are traced when user space has asked for it at load time;
//! otherwise the verifier finds the level constant and removes the tracing.
//!
//! Verdicts are those of tcx: `TCX_NEXT`, `TCX_DROP` and what `bpf_redirect`
//! returns. Others of the older `TC_ACT_*` family mean "next" there.

#![no_std]
#![no_main]

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_redirect, bpf_skb_load_bytes,
};
use aya_ebpf::macros::{btf_map, classifier};
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::trace;
use migrate_ebpf_common::state::NEWCOMERS_MAX;
use migrate_ebpf_common::{
    Control, Counters, Direction, Ended, Fate, FlowKey, FlowRecord, Judgement, Layer2, ListenerKey,
    Packet, Route, Segment, State, Way, World, judge,
};

/// Leave the packet to the next program, and then to the stack.
const TCX_NEXT: i32 = -1;
/// Drop the packet.
const TCX_DROP: i32 = 2;
/// `BPF_F_MMAPABLE`: user space writes the control record without a call.
const MMAPABLE: usize = 1 << 10;
/// `BPF_F_NO_PREALLOC`.
const NO_PREALLOC: usize = 1;
/// `BPF_NOEXIST`: insert, and leave alone what is there.
const NOEXIST: u64 = 1;

#[btf_map]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();
/// The size is set when the programs are loaded. A plain hash: an LRU would
/// forget flows, and a forgotten flow is an RST sent. Memory is taken as flows
/// come, for the table is made with room for many more; a look-up costs the
/// same either way.
#[btf_map]
static FLOWS: HashMap<FlowKey, FlowRecord, 4096, NO_PREALLOC> = HashMap::new();
#[btf_map]
static LISTENERS: HashMap<ListenerKey, u32, 4096> = HashMap::new();
#[btf_map]
static STAGED: HashMap<[u8; 16], u32, 256> = HashMap::new();
/// Flows that the workload has closed and its peers have not done with, and
/// what becomes of them (`Ended`).
#[btf_map]
static ENDED: HashMap<FlowKey, u32, 4096> = HashMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counters, 1> = PerCpuArray::new();
/// By interface index. Two entries per interface at least: its own and those
/// of its TAP devices.
#[btf_map]
static ROUTES: HashMap<u32, Route, 256> = HashMap::new();

/// The mark of packets that come back from user space: a random number of this
/// gate's own, set when the programs are loaded.
#[unsafe(no_mangle)]
static OWN_MARK: u32 = 0;

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
    match judge(&Skb(ctx), layer2, ethertype, mark, direction, &Maps(ctx)) {
        Judgement::Pass => TCX_NEXT,
        Judgement::PassOwn => {
            // Nothing behind the gate, routing rules say, is to see it.
            // SAFETY: as above; a classifier may write the mark.
            unsafe { (*ctx.skb.skb).mark = 0 };
            count(|counters| match direction {
                Direction::Ingress => counters.injected += 1,
                Direction::Egress => counters.emitted += 1,
            });
            TCX_NEXT
        }
        Judgement::Hold => hold(ctx, direction),
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

/// Moves a packet to the TAP device of its interface and direction. There is
/// no copy, so it can be neither lost nor doubled in between.
#[inline(always)]
fn hold(ctx: &TcContext, direction: Direction) -> i32 {
    // SAFETY: as in `gate`.
    let index = unsafe { (*ctx.skb.skb).ifindex };
    let tap = match (route(index), direction) {
        (Some(route), Direction::Ingress) => route.ingress,
        (Some(route), Direction::Egress) => route.egress,
        (None, _) => 0,
    };
    if tap == 0 {
        trace!(
            ctx,
            "{} packet of {} bytes: nowhere to hold it",
            way(direction),
            ctx.len()
        );
        count_dropped(ctx, direction, false);
        return TCX_DROP;
    }
    let packets = segments(ctx);
    let bytes = u64::from(ctx.len());
    count(|counters| match direction {
        Direction::Ingress => {
            counters.held_ingress_packets += packets;
            counters.held_ingress_bytes += bytes;
        }
        Direction::Egress => {
            counters.held_egress_packets += packets;
            counters.held_egress_bytes += bytes;
        }
    });
    redirect(tap, 0)
}

/// What user space writes to a TAP device goes where the device's packets come
/// from; nothing of it ever enters the stack from the TAP device itself.
#[classifier]
pub fn gate_return(ctx: TcContext) -> i32 {
    // SAFETY: as in `gate`.
    let index = unsafe { (*ctx.skb.skb).ifindex };
    let Some(route) = route(index) else {
        return TCX_DROP;
    };
    // SAFETY: as in `gate`; a classifier may write the mark.
    unsafe { (*ctx.skb.skb).mark = own_mark() };
    if route.ingress != 0 {
        redirect(route.ingress, u64::from(BPF_F_INGRESS))
    } else if route.egress != 0 {
        redirect(route.egress, 0)
    } else {
        TCX_DROP
    }
}

#[inline(always)]
fn route(index: u32) -> Option<Route> {
    // SAFETY: entries are written before a packet can ask for them and stay.
    ROUTES.get_ptr(&index).map(|route| unsafe { *route })
}

/// The verdict that moves the packet. To an interface that is gone the kernel
/// drops it.
#[inline(always)]
fn redirect(index: u32, flags: u64) -> i32 {
    // SAFETY: the helper has no preconditions.
    let verdict = unsafe { bpf_redirect(index, flags) };
    verdict as i32
}

#[inline(always)]
fn own_mark() -> u32 {
    // SAFETY: a constant of the loaded program; volatile, because the compiler
    // sees only the zero that stands in the object.
    unsafe { core::ptr::read_volatile(&raw const OWN_MARK) }
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
    let packets = segments(ctx);
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

/// How many packets on the wire this one stands for.
#[inline(always)]
fn segments(ctx: &TcContext) -> u64 {
    // SAFETY: as in `gate`.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    u64::from(if segments == 0 { 1 } else { segments })
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
        // SAFETY: every bit pattern is a value of such an array.
        unsafe { self.read(offset) }
    }

    #[inline(always)]
    fn words<const N: usize>(&self, offset: usize) -> Option<[u32; N]> {
        // SAFETY: as above.
        unsafe { self.read(offset) }
    }
}

impl Skb<'_> {
    /// Bytes at `offset`. The buffer is not cleared before, for that alone
    /// would cost a loop over its bytes.
    ///
    /// # Safety
    ///
    /// Every bit pattern must be a `T`.
    #[inline(always)]
    unsafe fn read<T>(&self, offset: usize) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the context is valid for this run, and the buffer has the
        // size given.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.0.as_ptr(),
                offset as u32,
                value.as_mut_ptr().cast::<c_void>(),
                size_of::<T>() as u32,
            )
        };
        if result == 0 {
            // SAFETY: the helper has filled it, and the caller vouches for
            // what it holds.
            Some(unsafe { value.assume_init() })
        } else {
            None
        }
    }
}

struct Maps<'a>(&'a TcContext);

impl World for Maps<'_> {
    #[inline(always)]
    fn own_mark(&self) -> u32 {
        own_mark()
    }

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
    fn ended(&self, key: &FlowKey) -> Option<Ended> {
        // SAFETY: a value that is replaced meanwhile reads as the old or the
        // new one: it is one aligned word.
        Ended::read(unsafe { *ENDED.get_ptr(key)? })
    }

    #[inline(always)]
    fn forget_ended(&self, key: &FlowKey) {
        // Fails only for one that is gone already.
        let _ = ENDED.remove(key);
    }

    #[inline(always)]
    fn is_staged(&self, address: &[u8; 16]) -> bool {
        STAGED.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn track(
        &self,
        key: &FlowKey,
        segment: &Segment,
        direction: Direction,
        fate: Fate,
        is_watching: bool,
    ) {
        let Some(record) = FLOWS.get_ptr_mut(key) else {
            // Only what the workload's own kernel says proves a connection.
            if matches!((direction, fate), (Direction::Egress, Fate::Passes))
                && segment.is_established()
            {
                self.newcomer(key);
            }
            return;
        };
        // SAFETY: the record stays readable while the program runs, also when
        // the entry goes meanwhile. Others may write it at the same time: a
        // count is lost then, see `FlowRecord`.
        let record = unsafe { &mut *record };
        let way = match direction {
            Direction::Ingress => &mut record.ingress,
            Direction::Egress => &mut record.egress,
        };
        let packets = segments(self.0);
        match fate {
            Fate::Passes => {
                way.packets += packets;
                way.bytes += u64::from(self.0.len());
                way.last_ns = self.now_ns();
                count(|counters| counters.tracked_packets += 1);
            }
            Fate::Kept => way.kept = way.kept.wrapping_add(packets as u32),
            Fate::Returned => way.returned = way.returned.wrapping_add(packets as u32),
        }
        if is_watching {
            watch(way, segment, fate, packets as u32);
        }
        if record.is_newcomer != 0
            && matches!(fate, Fate::Passes)
            && record.finish(segment, direction)
            && FLOWS.remove(key).is_ok()
        {
            add_newcomers(-1);
        }
    }
}

impl Maps<'_> {
    /// Takes in a connection that one of the workload's listeners has accepted.
    #[inline(always)]
    fn newcomer(&self, key: &FlowKey) {
        if !self.has_listener(&key.listener()) && !self.has_listener(&key.wildcard_listener()) {
            return;
        }
        let room = match CONTROL.get_ptr(0) {
            // SAFETY: as in `state`.
            Some(control) => unsafe {
                core::ptr::read_volatile(&raw const (*control).newcomers) < u64::from(NEWCOMERS_MAX)
            },
            None => false,
        };
        let mut record = FlowRecord::default();
        record.egress.packets = segments(self.0);
        record.egress.bytes = u64::from(self.0.len());
        record.egress.last_ns = self.now_ns();
        record.is_newcomer = 1;
        if room && FLOWS.insert(key, record, NOEXIST).is_ok() {
            add_newcomers(1);
            count(|counters| counters.tracked_packets += 1);
        } else {
            count(|counters| counters.newcomers_missed += 1);
        }
    }
}

/// Sequence numbers, and the first packet since the mark. Off while the gate
/// is only open, so its cost does not matter.
#[inline(always)]
fn watch(way: &mut Way, segment: &Segment, fate: Fate, packets: u32) {
    way.watch(segment, fate, packets);
    if matches!(fate, Fate::Kept) {
        return;
    }
    let Some(control) = CONTROL.get_ptr(0) else {
        return;
    };
    // SAFETY: as in `World::state`.
    let mark_ns = unsafe { core::ptr::read_volatile(&raw const (*control).mark_ns) };
    // The exact clock: what is told of it is a matter of milliseconds.
    // SAFETY: the helper has no preconditions.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    way.last_ns = now_ns;
    if way.first_ns < mark_ns {
        way.first_ns = now_ns;
    }
}

/// Two CPUs at once may lose one of their changes, for the target has no atomic
/// addition in safe reach; the bound has slack, and user space puts the number
/// right at every round.
#[inline(always)]
fn add_newcomers(number: i64) {
    if let Some(control) = CONTROL.get_ptr_mut(0) {
        // SAFETY: an aligned word of a map that lives as long as the program.
        unsafe {
            let newcomers = &raw mut (*control).newcomers;
            let sum = newcomers.read_volatile().wrapping_add(number as u64);
            newcomers.write_volatile(sum);
        }
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
