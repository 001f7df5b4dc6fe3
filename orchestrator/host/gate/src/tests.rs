//! The programs themselves, run by the kernel on hand-made packets and, in
//! `network`, between two network namespaces.

/// Returns from the calling test, with a line that says so, without root.
macro_rules! needs_root {
    ($test:expr) => {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP {}: needs root", $test);
            return;
        }
    };
}

/// The same without TUN and TAP devices.
macro_rules! needs_tun {
    ($test:expr) => {
        if !std::path::Path::new("/dev/net/tun").exists() {
            println!("SKIP {}: needs /dev/net/tun", $test);
            return;
        }
    };
}

mod foreign;
mod hold;
mod network;
pub(crate) mod packets;
mod stacked;
mod track;

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aya::Ebpf;
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use migrate_core::{Flow, Listener};
use migrate_ebpf_common::{Direction, EXEMPT_MARK, Mode};

use self::packets::{ACK, Packet, RST, SYN};
use crate::GateError;
use crate::sys::{self, DeviceKind};
use crate::tables::{self, Tables};
use crate::trace::Trace;

const NEXT: i32 = -1;
const DROP: i32 = 2;
const LOCAL: &str = "10.77.0.100:6379";
const PEER: &str = "10.77.0.1:40000";
const OWN_MARK: u32 = 0x1234_abcd;

/// The programs, loaded but attached nowhere, with the maps they read.
struct Programs {
    ebpf: Ebpf,
    tables: Tables,
}

impl Programs {
    fn load() -> Self {
        let (mut ebpf, tables) = tables::load(1024, OWN_MARK).unwrap();
        for (direction, kind) in [
            (Direction::Ingress, DeviceKind::Ethernet),
            (Direction::Egress, DeviceKind::Ethernet),
            (Direction::Ingress, DeviceKind::Bare),
            (Direction::Egress, DeviceKind::Bare),
        ] {
            crate::load_program(&mut ebpf, direction, kind).unwrap();
        }
        Self { ebpf, tables }
    }

    /// With the flow and the listener of most tests, closed, without a lease.
    fn closed() -> Self {
        let programs = Self::load();
        programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
        programs.tables.close(Mode::Drop).unwrap();
        programs
    }

    fn run_marked(&mut self, name: &str, packet: &[u8], mark: u32) -> i32 {
        self.run(name, packet, mark).0
    }

    /// The verdict, and the packet's mark behind the program.
    fn run(&mut self, name: &str, packet: &[u8], mark: u32) -> (i32, u32) {
        // The start of `struct __sk_buff`: len, pkt_type, mark. Only the mark
        // may be set among them.
        let mut context = [0_u8; 12];
        context[8..].copy_from_slice(&mark.to_ne_bytes());
        let mut context_after = [0_u8; 192];
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.ctx_in = Some(&context);
        options.ctx_out = Some(&mut context_after);
        let verdict = self.program(name).test_run(options).unwrap().return_value;
        let mark = u32::from_ne_bytes(context_after[8..12].try_into().unwrap());
        (verdict.cast_signed(), mark)
    }

    fn cost_ns(&mut self, name: &str, packet: &[u8]) -> u64 {
        crate::cost::mean_ns(self.program(name), packet).unwrap()
    }

    fn program(&mut self, name: &str) -> &mut SchedClassifier {
        self.ebpf.program_mut(name).unwrap().try_into().unwrap()
    }

    fn ingress(&mut self, packet: &Packet) -> i32 {
        self.run_marked("gate_ingress", &packet.bytes(), 0)
    }

    fn egress(&mut self, packet: &Packet) -> i32 {
        self.run_marked("gate_egress", &packet.bytes(), 0)
    }

    /// The verdicts on a segment from the peer and on the answer to it.
    fn both(&mut self, local: &str, peer: &str) -> (i32, i32) {
        (
            self.ingress(&Packet::tcp(peer, local, ACK)),
            self.egress(&Packet::tcp(local, peer, ACK)),
        )
    }
}

fn flow(local: &str, remote: &str) -> Flow {
    Flow::new(local.parse().unwrap(), remote.parse().unwrap())
}

fn listener(local: &str, v6only: bool) -> Listener {
    Listener {
        local: local.parse().unwrap(),
        v6only,
    }
}

fn ip(address: &str) -> IpAddr {
    address.parse().unwrap()
}

#[test]
fn a_closed_gate_drops_its_flow_both_ways_and_nothing_else() {
    needs_root!("a_closed_gate_drops_its_flow_both_ways_and_nothing_else");
    let mut programs = Programs::closed();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    for (local, peer) in [
        (LOCAL, "10.77.0.1:40001"),
        (LOCAL, "10.77.0.2:40000"),
        ("10.77.0.100:6380", PEER),
        ("10.77.0.101:6379", PEER),
        // The same flow seen from its other end is another flow.
        (PEER, LOCAL),
    ] {
        assert_eq!(programs.both(local, peer), (NEXT, NEXT), "{local} {peer}");
    }
    let counters = programs.tables.counters().unwrap();
    let bytes = u64::try_from(Packet::tcp(PEER, LOCAL, ACK).bytes().len()).unwrap();
    assert_eq!(counters.ingress_dropped_packets, 1);
    assert_eq!(counters.egress_dropped_packets, 1);
    assert_eq!(counters.ingress_dropped_bytes, bytes);
    assert_eq!(counters.egress_dropped_bytes, bytes);
}

#[test]
fn an_open_gate_passes_everything() {
    needs_root!("an_open_gate_passes_everything");
    let mut programs = Programs::closed();
    programs.tables.open_all();
    assert_eq!(programs.both(LOCAL, PEER), (NEXT, NEXT));
}

#[test]
fn egress_opens_before_ingress() {
    needs_root!("egress_opens_before_ingress");
    let mut programs = Programs::closed();
    programs.tables.open_egress();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, NEXT));
    programs.tables.open_all();
    assert_eq!(programs.both(LOCAL, PEER), (NEXT, NEXT));
}

#[test]
fn what_cannot_be_held_is_dropped() {
    needs_root!("what_cannot_be_held_is_dropped");
    let mut programs = Programs::load();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    programs.tables.close(Mode::Hold).unwrap();
    // The interface of these packets has no devices to hold them.
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    let counters = programs.tables.counters().unwrap();
    assert_eq!(counters.ingress_dropped_packets, 1);
    assert_eq!(counters.egress_dropped_packets, 1);
    assert_eq!(counters.held_ingress_packets, 0);
    programs.tables.open_egress();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, NEXT));
}

#[test]
fn what_comes_back_passes_in_every_state_without_its_mark() {
    needs_root!("what_comes_back_passes_in_every_state_without_its_mark");
    let mut programs = Programs::closed();
    let packet = Packet::tcp(PEER, LOCAL, ACK).bytes();
    for _ in 0..2 {
        for name in ["gate_ingress", "gate_egress"] {
            let (verdict, mark) = programs.run(name, &packet, OWN_MARK);
            assert_eq!((verdict, mark), (NEXT, 0));
        }
        programs.tables.open_all();
    }
    let counters = programs.tables.counters().unwrap();
    assert_eq!((counters.injected, counters.emitted), (2, 2));
}

/// Not a judgement: what a packet costs, for people to compare.
#[test]
fn costs_per_packet() {
    needs_root!("costs_per_packet");
    let mut programs = Programs::load();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    let ours = Packet::tcp(PEER, LOCAL, ACK).bytes();
    let foreign = Packet::tcp(PEER, "10.77.0.11:22", ACK).bytes();
    let cost = |programs: &mut Programs, what: &str| {
        for (whose, packet) in [("workload's", &ours), ("foreign", &foreign)] {
            let ns = programs.cost_ns("gate_ingress", packet);
            println!("{what}, {whose} packet: {ns} ns");
        }
    };
    cost(&mut programs, "open, nothing counted");
    programs.tables.start_tracking();
    cost(&mut programs, "open");
    let (local, peer) = ("[fd00:77::100]:6379", "[fd00:77::1]:40000");
    programs.tables.add_flows(&[flow(local, peer)]).unwrap();
    let ipv6 = Packet::tcp(peer, local, ACK).bytes();
    println!("open, IPv6: {} ns", programs.cost_ns("gate_ingress", &ipv6));
    programs.tables.start_watching();
    cost(&mut programs, "open, watched");
    programs.tables.stage(&[ip("10.77.0.100")]).unwrap();
    cost(&mut programs, "open, an address staged");
    programs.tables.unstage(&[ip("10.77.0.100")]).unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    cost(&mut programs, "closed");
    let lease = Duration::from_secs(60);
    programs.tables.lease(Some(lease)).unwrap();
    cost(&mut programs, "closed, with a lease");
}

/// It refuses a frame that the gate takes for somebody else's.
#[test]
fn the_benchmark_measures_flows_of_the_tree() {
    needs_root!("the_benchmark_measures_flows_of_the_tree");
    let costs = crate::cost::open_gate(100).unwrap();
    assert_eq!(costs.len(), 6);
    assert!(costs.iter().all(|cost| cost.ns > 0), "{costs:?}");
}

#[test]
fn ingress_closes_before_egress() {
    needs_root!("ingress_closes_before_egress");
    let mut programs = Programs::closed();
    programs.tables.open_all();
    programs.tables.close_ingress(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, NEXT));
    programs.tables.close(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    // It opens nothing.
    programs.tables.close_ingress(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
}

/// Nobody's resets leave, and everything else does.
#[test]
fn a_mute_gate_drops_resets_alone() {
    needs_root!("a_mute_gate_drops_resets_alone");
    let mut programs = Programs::load();
    programs.tables.mute().unwrap();
    for (local, peer) in [(LOCAL, PEER), ("[fd00:77::100]:6379", "[fd00:77::1]:40000")] {
        assert_eq!(programs.both(local, peer), (NEXT, NEXT));
        assert_eq!(programs.egress(&Packet::tcp(local, peer, RST)), DROP);
        assert_eq!(programs.ingress(&Packet::tcp(peer, local, RST)), NEXT);
    }
    programs.tables.open_all();
    assert_eq!(programs.egress(&Packet::tcp(LOCAL, PEER, RST)), NEXT);
}

#[test]
fn ipv6_flows_are_matched() {
    needs_root!("ipv6_flows_are_matched");
    let mut programs = Programs::closed();
    let (local, peer) = ("[fd00:77::100]:6379", "[fd00:77::1]:40000");
    assert_eq!(programs.both(local, peer), (NEXT, NEXT));
    programs.tables.add_flows(&[flow(local, peer)]).unwrap();
    assert_eq!(programs.both(local, peer), (DROP, DROP));
    let behind_options = Packet::tcp(peer, local, ACK).with_ipv6_extensions(&[0, 60, 51]);
    assert_eq!(programs.ingress(&behind_options), DROP);
}

#[test]
fn a_mapped_socket_is_its_ipv4_flow() {
    needs_root!("a_mapped_socket_is_its_ipv4_flow");
    let mut programs = Programs::load();
    let mapped = Flow {
        local: "[::ffff:10.77.0.100]:6379".parse().unwrap(),
        remote: "[::ffff:10.77.0.1]:40000".parse().unwrap(),
    };
    programs.tables.add_flows(&[mapped]).unwrap();
    programs
        .tables
        .add_listeners(&[listener("[::ffff:10.77.0.100]:7000", false)])
        .unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    let syn = Packet::tcp(PEER, "10.77.0.100:7000", SYN);
    assert_eq!(programs.ingress(&syn), DROP);
}

#[test]
fn a_listener_keeps_new_connections_out() {
    needs_root!("a_listener_keeps_new_connections_out");
    let mut programs = Programs::load();
    programs
        .tables
        .add_listeners(&[listener("10.77.0.100:7001", false)])
        .unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    let syn = |to: &str| Packet::tcp("10.77.0.9:50000", to, SYN);
    assert_eq!(programs.ingress(&syn("10.77.0.100:7001")), DROP);
    assert_eq!(programs.ingress(&syn("10.77.0.100:7002")), NEXT);
    assert_eq!(programs.ingress(&syn("10.77.0.11:7001")), NEXT);
}

#[test]
fn wildcards_keep_to_their_families() {
    needs_root!("wildcards_keep_to_their_families");
    let v4 = ("10.77.0.100:7000", "10.77.0.9:50000");
    let v6 = ("[fd00:77::100]:7000", "[fd00:77::9]:50000");
    for (local, v6only, v4_verdict, v6_verdict) in [
        ("0.0.0.0:7000", false, DROP, NEXT),
        ("[::]:7000", false, DROP, DROP),
        ("[::]:7000", true, NEXT, DROP),
    ] {
        let mut programs = Programs::load();
        programs
            .tables
            .add_listeners(&[listener(local, v6only)])
            .unwrap();
        programs.tables.close(Mode::Drop).unwrap();
        let case = format!("{local} v6only={v6only}");
        assert_eq!(
            programs.both(v4.0, v4.1),
            (v4_verdict, v4_verdict),
            "{case}"
        );
        assert_eq!(
            programs.both(v6.0, v6.1),
            (v6_verdict, v6_verdict),
            "{case}"
        );
    }
}

#[test]
fn tags_options_and_fragments_are_read() {
    needs_root!("tags_options_and_fragments_are_read");
    let mut programs = Programs::closed();
    let segment = || Packet::tcp(PEER, LOCAL, ACK);
    assert_eq!(programs.ingress(&segment().with_vlan_tags(1)), DROP);
    assert_eq!(programs.ingress(&segment().with_vlan_tags(2)), DROP);
    assert_eq!(programs.ingress(&segment().with_ipv4_options(40)), DROP);
    assert_eq!(programs.ingress(&segment().with_fragment_offset(0)), DROP);
    // Without the first fragment this one is never put together.
    assert_eq!(programs.ingress(&segment().with_fragment_offset(185)), NEXT);
}

#[test]
fn crius_own_packets_pass() {
    needs_root!("crius_own_packets_pass");
    let mut programs = Programs::closed();
    let forged = Packet::tcp(PEER, LOCAL, ACK).bytes();
    assert_eq!(
        programs.run_marked("gate_ingress", &forged, EXEMPT_MARK),
        NEXT
    );
    assert_eq!(
        programs.run_marked("gate_ingress", &forged, EXEMPT_MARK + 1),
        DROP
    );
}

#[test]
fn resets_are_counted_and_kept_in() {
    needs_root!("resets_are_counted_and_kept_in");
    let mut programs = Programs::closed();
    let reset = Packet::tcp(LOCAL, PEER, RST);
    let foreign = Packet::tcp("10.77.0.11:22", PEER, RST);
    assert_eq!(programs.egress(&reset), DROP);
    assert_eq!(programs.egress(&foreign), NEXT);
    let counters = programs.tables.counters().unwrap();
    assert_eq!((counters.rst_dropped, counters.rst_sent), (1, 0));
    programs.tables.open_egress();
    assert_eq!(programs.egress(&reset), NEXT);
    assert_eq!(programs.egress(&foreign), NEXT);
    let counters = programs.tables.counters().unwrap();
    assert_eq!((counters.rst_dropped, counters.rst_sent), (1, 1));
}

#[test]
fn a_lease_that_runs_out_opens_the_gate() {
    needs_root!("a_lease_that_runs_out_opens_the_gate");
    let mut programs = Programs::load();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    // Longer than this test may be kept from looking.
    let lease = Duration::from_secs(2);
    programs.tables.lease(Some(lease)).unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    // The programs' clock lags by up to a tick: wait for what they see.
    let end = sys::now_ns() + 20_000_000_000;
    while programs.both(LOCAL, PEER) != (NEXT, NEXT) {
        assert!(sys::now_ns() < end, "the gate did not open");
        std::thread::yield_now();
    }
    assert_eq!(programs.tables.lease_left(), Some(Duration::ZERO));
    // What has been open is not silently closed again.
    for ttl in [Some(lease), None] {
        let refused = programs.tables.lease(ttl).unwrap_err();
        assert!(
            matches!(refused, GateError::LeaseExpired { .. }),
            "{refused}"
        );
        assert_eq!(programs.both(LOCAL, PEER), (NEXT, NEXT));
    }
    let refused = programs.tables.close(Mode::Drop).unwrap_err();
    assert!(
        matches!(refused, GateError::LeaseExpired { .. }),
        "{refused}"
    );
    // An open gate may have a new lease and be closed anew.
    programs
        .tables
        .lease(Some(Duration::from_secs(60)))
        .unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
}

#[test]
fn without_a_lease_the_gate_stays_closed() {
    needs_root!("without_a_lease_the_gate_stays_closed");
    let mut programs = Programs::load();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    let ttl = Duration::from_secs(1);
    programs.tables.lease(Some(ttl)).unwrap();
    programs.tables.close(Mode::Drop).unwrap();
    programs.tables.lease(None).unwrap();
    let end = sys::now_ns() + u64::try_from(ttl.as_nanos()).unwrap() * 2;
    while sys::now_ns() < end {
        assert_eq!(programs.both(LOCAL, PEER), (DROP, DROP));
    }
    assert_eq!(programs.tables.lease_left(), None);
}

#[test]
fn a_staged_ipv4_address_is_kept_quiet_in_every_state() {
    needs_root!("a_staged_ipv4_address_is_kept_quiet_in_every_state");
    let mut programs = Programs::load();
    programs.tables.stage(&[ip("10.77.0.100")]).unwrap();
    let (staged, peer, own) = ("10.77.0.100", "10.77.0.1", "10.77.0.12");
    for close in [false, true] {
        if close {
            programs.tables.close(Mode::Drop).unwrap();
        }
        // Reply, gratuitous request, request about others in its name, probe.
        assert_eq!(programs.egress(&Packet::arp(2, staged, peer)), DROP);
        assert_eq!(programs.egress(&Packet::arp(1, staged, staged)), DROP);
        assert_eq!(programs.egress(&Packet::arp(1, staged, peer)), DROP);
        assert_eq!(programs.egress(&Packet::arp(1, "0.0.0.0", staged)), DROP);
        assert_eq!(programs.ingress(&Packet::arp(1, peer, staged)), DROP);
        // Those of the host's own address go on.
        assert_eq!(programs.egress(&Packet::arp(1, own, peer)), NEXT);
        assert_eq!(programs.ingress(&Packet::arp(1, peer, own)), NEXT);
        assert_eq!(programs.ingress(&Packet::arp(2, peer, own)), NEXT);
    }
    assert_eq!(
        programs.tables.counters().unwrap().staged_dropped_packets,
        10
    );
    programs.tables.unstage(&[ip("10.77.0.100")]).unwrap();
    assert_eq!(programs.egress(&Packet::arp(1, staged, staged)), NEXT);
    assert_eq!(programs.ingress(&Packet::arp(1, peer, staged)), NEXT);
    // Once more is no error.
    programs.tables.unstage(&[ip("10.77.0.100")]).unwrap();
}

#[test]
fn a_staged_ipv6_address_is_kept_quiet() {
    needs_root!("a_staged_ipv6_address_is_kept_quiet");
    let mut programs = Programs::load();
    programs.tables.stage(&[ip("fd00:77::100")]).unwrap();
    let (staged, peer, own) = ("fd00:77::100", "fd00:77::1", "fd00:77::12");
    let (solicitation, advertisement, router_solicitation) = (135, 136, 133);
    let nd = Packet::neighbour_discovery;
    assert_eq!(
        programs.egress(&nd(advertisement, staged, peer, staged)),
        DROP
    );
    assert_eq!(programs.egress(&nd(advertisement, own, peer, staged)), DROP);
    assert_eq!(programs.egress(&nd(solicitation, staged, peer, peer)), DROP);
    assert_eq!(
        programs.egress(&nd(router_solicitation, staged, peer, peer)),
        DROP
    );
    assert_eq!(programs.egress(&nd(solicitation, "::", peer, staged)), DROP);
    assert_eq!(
        programs.ingress(&nd(solicitation, peer, staged, staged)),
        DROP
    );
    assert_eq!(programs.egress(&nd(advertisement, own, peer, own)), NEXT);
    assert_eq!(programs.ingress(&nd(solicitation, peer, own, own)), NEXT);
    programs.tables.unstage(&[ip("fd00:77::100")]).unwrap();
    assert_eq!(
        programs.ingress(&nd(solicitation, peer, staged, staged)),
        NEXT
    );
}

#[test]
fn flows_beyond_the_capacity_are_an_error() {
    needs_root!("flows_beyond_the_capacity_are_an_error");
    let programs = Programs::load();
    let flows = |ports: std::ops::Range<u16>| -> Vec<Flow> {
        ports
            .map(|port| flow(LOCAL, &format!("10.77.0.1:{port}")))
            .collect()
    };
    programs.tables.add_flows(&flows(1..1001)).unwrap();
    // Known ones take no room.
    programs.tables.add_flows(&flows(1..1001)).unwrap();
    assert_eq!(programs.tables.count_flows().unwrap().flows, 1000);
    let error = programs.tables.add_flows(&flows(2000..3000)).unwrap_err();
    assert!(
        matches!(
            error,
            GateError::Full {
                capacity: 1024,
                asked: 1000,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.help().is_some());
}

/// Gathers what a subscriber writes.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn dropped_packets_are_traced_on_demand() {
    needs_root!("dropped_packets_are_traced_on_demand");
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("migrate_gate::packets=trace")
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        let mut programs = Programs::closed();
        let trace = Trace::read(&mut programs.ebpf);
        assert_eq!(programs.egress(&Packet::tcp(LOCAL, PEER, RST)), DROP);
        trace.flush();
    });
    let bytes = lines.0.lock().unwrap();
    let text = String::from_utf8_lossy(&bytes);
    assert!(
        text.contains("outbound RST of 54 bytes: dropped"),
        "{text:?}"
    );
}
