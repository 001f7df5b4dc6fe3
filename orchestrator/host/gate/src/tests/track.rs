//! What the gate remembers of flows, by hand-made packets.

use std::time::Instant;

use migrate_core::Flow;
use migrate_ebpf_common::Mode;
use migrate_ebpf_common::state::NEWCOMERS_MAX;

use super::network::PATIENCE;
use super::packets::{ACK, FIN, Packet, RST, SYN};
use super::{DROP, LOCAL, NEXT, OWN_MARK, PEER, Programs, flow, listener};
use crate::tables;
use crate::{FlowActivity, FlowCount};

impl Programs {
    fn tracking() -> Self {
        let programs = Self::load();
        programs.tables.start_tracking();
        programs
    }

    fn activity(&self, of: Flow) -> FlowActivity {
        let found = self.tables.activity(None).unwrap();
        *found.iter().find(|activity| activity.flow == of).unwrap()
    }

    fn flows(&self) -> usize {
        self.tables.count_flows().unwrap().flows
    }
}

#[test]
fn an_open_gate_counts_its_flows_and_no_others() {
    needs_root!("an_open_gate_counts_its_flows_and_no_others");
    let mut programs = Programs::tracking();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    let packet = Packet::tcp(PEER, LOCAL, ACK).with_data(100);
    let bytes = u64::try_from(packet.bytes().len()).unwrap();
    assert_eq!(programs.ingress(&packet), NEXT);
    assert_eq!(programs.ingress(&packet), NEXT);
    assert_eq!(programs.both(LOCAL, "10.77.0.2:40000"), (NEXT, NEXT));
    let seen = programs.activity(flow(LOCAL, PEER));
    assert_eq!((seen.ingress.packets, seen.ingress.bytes), (2, 2 * bytes));
    assert_eq!((seen.egress.packets, seen.egress.last_ns), (0, 0));
    assert!(seen.ingress.last_ns > 0);
    assert_eq!(programs.egress(&Packet::tcp(LOCAL, PEER, ACK)), NEXT);
    let seen = programs.activity(flow(LOCAL, PEER));
    assert_eq!((seen.ingress.packets, seen.egress.packets), (2, 1));
    assert_eq!(programs.flows(), 1);
    // Nothing is looked at that is only there while the gate closes.
    assert_eq!((seen.ingress.repeated, seen.ingress.first_ns), (0, 0));
    // What is named again keeps what is remembered of it.
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    assert_eq!(programs.activity(flow(LOCAL, PEER)), seen);
    assert_eq!(programs.tables.counters().unwrap().tracked_packets, 3);
}

#[test]
fn a_flow_is_dirty_until_a_round_without_traffic() {
    needs_root!("a_flow_is_dirty_until_a_round_without_traffic");
    let mut programs = Programs::tracking();
    let other = "10.77.0.1:40001";
    let both = [flow(LOCAL, PEER), flow(LOCAL, other)];
    programs.tables.add_flows(&both).unwrap();
    let count = |dirty| FlowCount { flows: 2, dirty };
    assert_eq!(programs.tables.next_round().unwrap(), count(0));
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK));
    assert_eq!(programs.tables.count_flows().unwrap(), count(1));
    programs.egress(&Packet::tcp(LOCAL, other, ACK));
    assert_eq!(programs.tables.next_round().unwrap(), count(2));
    // The clock of both sides moves on with the tick: traffic of the tick in
    // which a round begins is that round's as well.
    let end = Instant::now() + PATIENCE;
    while programs.tables.next_round().unwrap() != count(0) {
        assert!(Instant::now() < end, "the flows stay dirty");
        std::thread::yield_now();
    }
}

#[test]
fn connections_of_a_listener_are_taken_in_and_given_up() {
    needs_root!("connections_of_a_listener_are_taken_in_and_given_up");
    let mut programs = Programs::tracking();
    programs
        .tables
        .add_listeners(&[listener("0.0.0.0:6379", false)])
        .unwrap();
    // A flood of SYN, of the answers to it, and of forged segments with RST in
    // return leaves nothing behind.
    for port in 1..200 {
        let peer = format!("10.77.0.9:{port}");
        programs.ingress(&Packet::tcp(&peer, LOCAL, SYN));
        programs.egress(&Packet::tcp(LOCAL, &peer, SYN | ACK));
        programs.ingress(&Packet::tcp(&peer, LOCAL, ACK));
        assert_eq!(programs.flows(), 0);
        programs.egress(&Packet::tcp(LOCAL, &peer, RST));
    }
    // Nor does what goes out from elsewhere.
    programs.egress(&Packet::tcp("10.77.0.100:9", PEER, ACK));
    assert_eq!(programs.flows(), 0);

    programs.egress(&Packet::tcp(LOCAL, PEER, ACK));
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK));
    let seen = programs.activity(flow(LOCAL, PEER));
    assert_eq!((seen.ingress.packets, seen.egress.packets), (1, 1));
    // The peer closes first, then the workload.
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK | FIN));
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK | FIN));
    assert_eq!(programs.flows(), 1);
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK));
    assert_eq!(programs.flows(), 0);
    // The workload closes first: the last word is its own.
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK));
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK | FIN));
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK | FIN));
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK));
    assert_eq!(programs.flows(), 0);
    // A reset ends it at once.
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK));
    programs.ingress(&Packet::tcp(PEER, LOCAL, RST));
    assert_eq!(programs.flows(), 0);

    // A flow that user space has named stays until user space says otherwise.
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    programs.ingress(&Packet::tcp(PEER, LOCAL, RST));
    assert_eq!(programs.flows(), 1);
    assert_eq!(programs.tables.counters().unwrap().newcomers_missed, 0);
}

#[test]
fn newcomers_leave_room_for_the_flows_that_are_named() {
    needs_root!("newcomers_leave_room_for_the_flows_that_are_named");
    let mut programs = Programs::tracking();
    programs
        .tables
        .add_listeners(&[listener(LOCAL, false)])
        .unwrap();
    let beyond = 10;
    for number in 0..NEWCOMERS_MAX + beyond {
        let peer = format!("10.88.{}.1:{}", number >> 14, 1 + (number & 0x3fff));
        programs.egress(&Packet::tcp(LOCAL, &peer, ACK));
    }
    let newcomers = usize::try_from(NEWCOMERS_MAX).unwrap();
    assert_eq!(programs.flows(), newcomers);
    let missed = programs.tables.counters().unwrap().newcomers_missed;
    assert_eq!(missed, u64::from(beyond));
    // As many as the gate was made for.
    let named: Vec<Flow> = (1..=1024)
        .map(|port| flow(LOCAL, &format!("10.99.0.1:{port}")))
        .collect();
    programs.tables.add_flows(&named).unwrap();
    assert_eq!(programs.flows(), newcomers + named.len());
    // A look at the tree's sockets clears what is left of the storm, once it
    // has been idle for a round.
    let end = Instant::now() + PATIENCE;
    while programs.flows() > named.len() {
        assert!(Instant::now() < end, "{} flows stay", programs.flows());
        programs.tables.next_round().unwrap();
        programs.tables.retain_flows(&named).unwrap();
    }
    programs.egress(&Packet::tcp(LOCAL, PEER, ACK));
    assert_eq!(programs.flows(), named.len() + 1);
}

#[test]
fn what_has_traffic_is_kept_whatever_is_said_of_it() {
    needs_root!("what_has_traffic_is_kept_whatever_is_said_of_it");
    let mut programs = Programs::tracking();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    programs.ingress(&Packet::tcp(PEER, LOCAL, ACK));
    programs.tables.retain_flows(&[]).unwrap();
    assert_eq!(programs.flows(), 1);
}

#[test]
fn what_is_kept_back_and_given_back_is_counted_by_flow() {
    needs_root!("what_is_kept_back_and_given_back_is_counted_by_flow");
    let mut programs = Programs::tracking();
    programs.tables.add_flows(&[flow(LOCAL, PEER)]).unwrap();
    programs.tables.start_watching();
    programs.tables.close(Mode::Drop).unwrap();
    let first = Packet::tcp(PEER, LOCAL, ACK).with_data(100).with_lengths();
    assert_eq!(programs.ingress(&first), DROP);
    // The peer's timer has run out.
    assert_eq!(programs.ingress(&first), DROP);
    assert_eq!(programs.egress(&Packet::tcp(LOCAL, PEER, RST)), DROP);
    let seen = programs.activity(flow(LOCAL, PEER));
    assert_eq!((seen.ingress.packets, seen.ingress.kept), (0, 2));
    assert_eq!((seen.ingress.repeated, seen.egress.resets), (1, 1));
    assert_eq!((seen.ingress.first_ns, seen.ingress.last_ns), (0, 0));

    let came_back = programs.run_marked("gate_ingress", &first.bytes(), OWN_MARK);
    assert_eq!(came_back, NEXT);
    let seen = programs.activity(flow(LOCAL, PEER));
    assert_eq!((seen.ingress.returned, seen.ingress.repeated), (1, 1));
    assert!(seen.ingress.first_ns > 0);
    // The next mark asks for the first packet after it.
    let before = seen.ingress.first_ns;
    programs.tables.start_watching();
    programs.tables.open_all();
    assert_eq!(programs.ingress(&first), NEXT);
    let seen = programs.activity(flow(LOCAL, PEER));
    assert!(seen.ingress.first_ns > before);
    assert_eq!((seen.ingress.packets, seen.ingress.repeated), (1, 2));
}

#[test]
fn a_hundred_thousand_flows_fit() {
    const FLOWS: u32 = 100_000;
    needs_root!("a_hundred_thousand_flows_fit");
    let (_ebpf, tables) = tables::load(FLOWS, OWN_MARK).unwrap();
    let flows: Vec<Flow> = (0..FLOWS)
        .map(|number| {
            let ([_, a, b, _], port) = (number.to_be_bytes(), 1 + (number & 0xff));
            flow(LOCAL, &format!("10.{a}.{b}.1:{port}"))
        })
        .collect();
    let timed = |what: &str, action: &dyn Fn()| {
        let begun = Instant::now();
        action();
        println!("{what} {FLOWS} flows: {:?}", begun.elapsed());
    };
    timed("add", &|| tables.add_flows(&flows).unwrap());
    timed("add again", &|| tables.add_flows(&flows).unwrap());
    timed("count", &|| {
        assert_eq!(tables.next_round().unwrap().flows, flows.len());
    });
    timed("clear up", &|| tables.retain_flows(&flows).unwrap());
    let mut read: Vec<Flow> = tables
        .activity(None)
        .unwrap()
        .iter()
        .map(|activity| activity.flow)
        .collect();
    read.sort_unstable();
    let mut wanted = flows;
    wanted.sort_unstable();
    assert_eq!(read, wanted);
}
