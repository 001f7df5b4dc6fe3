//! Holding on a veth pair, with real TCP on both sides.
//!
//! The retransmission timers of both ends are put out of the way
//! ([`without_timers`]), so TCP repairs no loss while a test runs, and a count
//! of retransmissions other than zero is a packet that the hold has lost.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use migrate_core::Flow;
use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;

use super::network::{Host, PATIENCE, Pair, SILENCE, detach, ip, options, read_one, tun};
use super::packets::{ACK, FIN, Packet, RST, SYN};
use super::{flow, listener};
use crate::{
    Counters, Direction, Gate, GateError, GateOptions, HeldPacket, HeldPackets, HoldOptions, Role,
};

/// How long packets are held: longer than the shortest of TCP's usual timers.
const HOLD: Duration = Duration::from_millis(300);
const ROOMY: HoldOptions = HoldOptions {
    total_bytes_max: 64 << 20,
    flow_bytes_max: 32 << 20,
};

fn attach(pair: &Pair, bounds: HoldOptions) -> (Gate, HeldPackets, u32) {
    attach_to(pair, "gate0", bounds)
}

fn attach_to(pair: &Pair, device: &str, bounds: HoldOptions) -> (Gate, HeldPackets, u32) {
    let (gate, index) = pair.server.run(|| {
        let index = if_nametoindex(device).unwrap();
        let options = GateOptions {
            hold: Some(bounds),
            ..options(&pair.directory)
        };
        (Gate::attach(&[index], &options).unwrap(), index)
    });
    assert!(gate.holds(), "{:?}", gate.drop_reason());
    let held = gate.held().unwrap();
    (gate, held, index)
}

/// No retransmission for half a minute, no probing for lost tails.
pub(super) fn without_timers(pair: &Pair) {
    without_timers_over(pair, ["gate0", "gate1"], "10.9.0.0/24", "fd00:9::/64");
}

/// The same for addresses on other devices, the server's and the client's.
pub(super) fn without_timers_over(pair: &Pair, devices: [&str; 2], v4: &str, v6: &str) {
    for (host, device) in [(&pair.server, devices[0]), (&pair.client, devices[1])] {
        host.run(|| {
            std::fs::write("/proc/sys/net/ipv4/tcp_early_retrans", "0").unwrap();
            ip(&format!("route replace {v4} dev {device} rto_min 30s"));
            ip(&format!(
                "-6 route replace {v6} dev {device} metric 1 rto_min 30s"
            ));
        });
    }
}

/// Segments that TCP has sent again in the two namespaces.
fn retransmissions(pair: &Pair) -> u64 {
    [&pair.server, &pair.client]
        .map(|host| {
            host.run(|| {
                let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap();
                let mut tcp = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
                let names = tcp.next().unwrap().split(' ');
                let values = tcp.next().unwrap().split(' ');
                let (_, value) = names
                    .zip(values)
                    .find(|(name, _)| *name == "RetransSegs")
                    .unwrap();
                value.parse::<u64>().unwrap()
            })
        })
        .iter()
        .sum()
}

fn await_that(what: &str, holds: impl FnMut() -> bool) {
    await_within(PATIENCE, what, holds);
}

pub(super) fn await_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < end, "{what} has not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The next held packet, as the owner waits for it.
fn next(held: &mut HeldPackets) -> Option<HeldPacket> {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(async { tokio::time::timeout(PATIENCE, held.next()).await })
        .expect("no packet is held")
}

/// Gives back what is held: to the stack, or to the network.
fn give_back(gate: &Gate, index: u32, packets: &[HeldPacket]) {
    for packet in packets {
        assert_eq!(packet.interface_index, index);
        match packet.direction {
            Direction::Ingress => gate.inject_ingress(index, &packet.frame).unwrap(),
            Direction::Egress => gate.emit_egress(index, &packet.frame).unwrap(),
        }
    }
}

/// A connection between the two namespaces whose flow the gate knows.
fn connected(pair: &Pair, gate: &Gate, address: &str) -> (TcpStream, TcpStream, TcpListener) {
    let listening = pair.listen(address);
    let client = pair
        .connect(listening.local_addr().unwrap(), PATIENCE)
        .unwrap();
    let (server, remote) = listening.accept().unwrap();
    gate.add_flows(&[Flow::new(server.local_addr().unwrap(), remote)])
        .unwrap();
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
    }
    (client, server, listening)
}

/// Frames that went through the programs: every one that was written.
fn assert_all_went_through(counters: Counters, packets: &[HeldPacket]) {
    let count = |direction| {
        let of_direction = packets
            .iter()
            .filter(|packet| packet.direction == direction);
        u64::try_from(of_direction.count()).unwrap()
    };
    assert_eq!(counters.injected, count(Direction::Ingress), "{counters:?}");
    assert_eq!(counters.emitted, count(Direction::Egress), "{counters:?}");
    assert_eq!(counters.hold_dropped, 0, "{counters:?}");
    assert_eq!(counters.ingress_dropped_packets, 0, "{counters:?}");
    assert_eq!(counters.egress_dropped_packets, 0, "{counters:?}");
}

fn question_and_answer(address: &str) {
    let pair = Pair::new();
    without_timers(&pair);
    question_and_answer_on(&pair, "gate0", address);
    pair.assert_nothing_left();
}

/// With a gate on a device of the server.
pub(super) fn question_and_answer_on(pair: &Pair, device: &str, address: &str) {
    let (gate, mut held, index) = attach_to(pair, device, ROOMY);
    let (client, server, _listening) = connected(pair, &gate, address);
    let before = retransmissions(pair);
    gate.close().unwrap();
    (&client).write_all(b"?").unwrap();
    let question = next(&mut held).unwrap();
    assert_eq!(question.direction, Direction::Ingress);
    // Not frozen as a real tree would be, so it can send.
    (&server).write_all(b"!").unwrap();
    let answer = next(&mut held).unwrap();
    assert_eq!(answer.direction, Direction::Egress);
    std::thread::sleep(HOLD);
    assert_eq!(held.try_drain(), []);
    assert_eq!(
        read_one(&server, SILENCE),
        Err(std::io::ErrorKind::WouldBlock)
    );

    gate.open_egress().unwrap();
    let all = [question, answer];
    give_back(&gate, index, &all);
    // Ingress is still closed: only what was given back can have come.
    assert_eq!(read_one(&server, PATIENCE), Ok(b'?'));
    assert_eq!(read_one(&client, PATIENCE), Ok(b'!'));
    assert_all_went_through(gate.counters().unwrap(), &all);
    gate.open().unwrap();
    give_back(&gate, index, &held.try_drain());
    (&client).write_all(b"x").unwrap();
    assert_eq!(read_one(&server, PATIENCE), Ok(b'x'));
    assert_eq!(retransmissions(pair), before);

    pair.server.run(|| detach(gate));
    assert_eq!(next(&mut held), None, "the gate is gone");
    pair.assert_only_others_left();
}

#[test]
fn a_question_is_held_and_answered_over_ipv4() {
    needs_root!("a_question_is_held_and_answered_over_ipv4");
    needs_tun!("a_question_is_held_and_answered_over_ipv4");
    question_and_answer("10.9.0.1:7000");
}

#[test]
fn a_question_is_held_and_answered_over_ipv6() {
    needs_root!("a_question_is_held_and_answered_over_ipv6");
    needs_tun!("a_question_is_held_and_answered_over_ipv6");
    question_and_answer("[fd00:9::1]:7000");
}

/// Bytes that tell where in the stream they belong.
fn numbered(position: usize) -> u8 {
    u8::try_from(position % 251 + position / 256 % 5).unwrap()
}

fn send_numbered(mut to: &TcpStream, bytes: usize) {
    let mut position = 0;
    while position < bytes {
        let piece: Vec<u8> = (position..bytes.min(position + (1 << 18)))
            .map(numbered)
            .collect();
        to.write_all(&piece).unwrap();
        position += piece.len();
    }
}

fn receive_numbered(mut from: &TcpStream, bytes: usize, received: &AtomicUsize) {
    let mut buffer = vec![0; 1 << 18];
    let mut position = 0;
    while position < bytes {
        let read = from.read(&mut buffer).unwrap();
        assert_ne!(read, 0, "ended at {position}");
        for (offset, byte) in buffer[..read].iter().enumerate() {
            assert_eq!(*byte, numbered(position + offset), "at {position}+{offset}");
        }
        position += read;
        received.store(position, Ordering::Relaxed);
    }
    assert_eq!(position, bytes);
}

/// TCP's sequence number in an IPv4 frame without options.
fn sequence_number(packet: &HeldPacket) -> u32 {
    let at = 10 + 14 + 20 + 4;
    u32::from_be_bytes(packet.frame[at..at + 4].try_into().unwrap())
}

/// The order of the crate's documentation. What the server, which is not
/// frozen here, would have sent goes before what it will send.
fn release(gate: &Gate, held: &mut HeldPackets, index: u32, all: &mut Vec<HeldPacket>) {
    let mut batch = held.try_drain();
    // A stable sort: the order within a direction stays.
    batch.sort_by_key(|packet| packet.direction == Direction::Ingress);
    let received = batch.partition_point(|packet| packet.direction == Direction::Egress);
    give_back(gate, index, &batch[..received]);
    gate.open_egress().unwrap();
    give_back(gate, index, &batch[received..]);
    all.extend(batch);
    gate.open().unwrap();
}

fn bulk(from_client: bool) {
    const BYTES: usize = 48 << 20;
    let pair = Pair::new();
    without_timers(&pair);
    let (gate, mut held, index) = attach(&pair, ROOMY);
    let (client, server, _listening) = connected(&pair, &gate, "10.9.0.1:7000");
    let (sender, receiver, data) = if from_client {
        (&client, &server, Direction::Ingress)
    } else {
        (&server, &client, Direction::Egress)
    };
    let mut all = Vec::new();
    let received = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| send_numbered(sender, BYTES));
        let receiving = scope.spawn(|| receive_numbered(receiver, BYTES, &received));
        // The windows have opened by then.
        await_that("a part of it", || {
            received.load(Ordering::Relaxed) >= BYTES / 8
        });
        gate.close().unwrap();
        await_that("held data", || {
            let counters = gate.counters().unwrap();
            counters.held_ingress_packets + counters.held_egress_packets > 0
        });
        std::thread::sleep(HOLD);
        release(&gate, &mut held, index, &mut all);
        // With no timer to help, every packet of the tail is needed.
        while !(sending.is_finished() && receiving.is_finished()) {
            let tail = held.try_drain();
            give_back(&gate, index, &tail);
            all.extend(tail);
        }
    });
    let data: Vec<&HeldPacket> = all
        .iter()
        .filter(|packet| packet.direction == data)
        .collect();
    let numbers: Vec<u32> = data.iter().map(|packet| sequence_number(packet)).collect();
    assert!(
        numbers
            .windows(2)
            .all(|pair| pair[1].wrapping_sub(pair[0]) < 1 << 31),
        "the order is kept"
    );
    assert_all_went_through(gate.counters().unwrap(), &all);
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn a_bulk_upload_is_held_without_loss() {
    needs_root!("a_bulk_upload_is_held_without_loss");
    needs_tun!("a_bulk_upload_is_held_without_loss");
    bulk(true);
}

#[test]
fn a_bulk_download_is_held_without_loss() {
    needs_root!("a_bulk_download_is_held_without_loss");
    needs_tun!("a_bulk_download_is_held_without_loss");
    bulk(false);
}

/// Connects while the gate is closed; the SYN waits, and the answer comes
/// while ingress is still closed, so it is the answer to what was given back.
fn held_syn(pair: &Pair, gate: &Gate, held: &mut HeldPackets, index: u32, address: &str) {
    let listening = pair.listen(address);
    let address = listening.local_addr().unwrap();
    gate.add_listeners(&[listener(&address.to_string(), false)])
        .unwrap();
    gate.close().unwrap();
    let syn = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| pair.connect(address, PATIENCE).unwrap());
        let syn = next(held).unwrap();
        std::thread::sleep(HOLD);
        gate.open_egress().unwrap();
        give_back(gate, index, std::slice::from_ref(&syn));
        drop(connecting.join().unwrap());
        syn
    });
    gate.open().unwrap();
    give_back(gate, index, &held.try_drain());
    drop(listening.accept().unwrap());
    // Its peer had sent it twice: the connection it began is over by now.
    let injected = || gate.counters().unwrap().injected;
    let before = injected();
    give_back(gate, index, &[syn]);
    std::thread::sleep(HOLD);
    assert_eq!(injected(), before);
}

#[test]
fn a_connection_begun_while_closed_is_answered_after() {
    needs_root!("a_connection_begun_while_closed_is_answered_after");
    needs_tun!("a_connection_begun_while_closed_is_answered_after");
    let pair = Pair::new();
    let (gate, mut held, index) = attach(&pair, HoldOptions::default());
    held_syn(&pair, &gate, &mut held, index, "10.9.0.1:7000");
    held_syn(&pair, &gate, &mut held, index, "[fd00:9::1]:7000");
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

/// Nothing of a connection that begins before everything that is held is in can be held
/// and be overtaken: it begins when the way in is open.
#[test]
fn a_connection_does_not_begin_before_the_way_in_is_open() {
    needs_root!("a_connection_does_not_begin_before_the_way_in_is_open");
    needs_tun!("a_connection_does_not_begin_before_the_way_in_is_open");
    let pair = Pair::new();
    let (gate, mut held, index) = attach(&pair, HoldOptions::default());
    let listening = pair.listen("10.9.0.1:7000");
    let address = listening.local_addr().unwrap();
    gate.add_listeners(&[listener(&address.to_string(), false)])
        .unwrap();
    gate.close().unwrap();
    let before = retransmissions(&pair);
    let client = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| pair.connect(address, PATIENCE).unwrap());
        let opening = next(&mut held).unwrap();
        assert_eq!(opening.direction, Direction::Ingress);
        gate.hold_answers();
        give_back(&gate, index, &[opening]);
        let answer = next(&mut held).unwrap();
        assert_eq!(answer.direction, Direction::Egress);
        assert!(!answer.is_bare());
        gate.open_ingress();
        give_back(&gate, index, &[answer]);
        connecting.join().unwrap()
    });
    // Its last word of the beginning, and the first of the rest, came by themselves.
    let (server, _) = listening.accept().unwrap();
    (&client).write_all(b"?").unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(read_one(&server, PATIENCE), Ok(b'?'));
    let late = held.try_drain();
    assert!(
        late.iter()
            .all(|packet| packet.direction == Direction::Egress)
    );
    gate.open().unwrap();
    give_back(&gate, index, &late);
    assert_eq!(retransmissions(&pair), before);
    drop((client, server));
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn a_tag_that_the_interface_takes_out_comes_back() {
    needs_root!("a_tag_that_the_interface_takes_out_comes_back");
    needs_tun!("a_tag_that_the_interface_takes_out_comes_back");
    let pair = Pair::new();
    let (gate, mut held, index) = attach(&pair, HoldOptions::default());
    let (local, remote) = ("10.9.0.1:7000", "10.9.0.2:5000");
    gate.add_flows(&[flow(local, remote)]).unwrap();
    gate.close().unwrap();
    let frame = Packet::tcp(remote, local, ACK)
        .with_lengths()
        .with_vlan_tags(1)
        .bytes();
    pair.client
        .run(|| nix::unistd::write(raw_socket("gate1"), &frame).unwrap());
    let packet = next(&mut held).unwrap();
    assert_eq!(packet.frame[10..], frame);
    gate.inject_ingress(index, &packet.frame).unwrap();
    assert_all_went_through(gate.counters().unwrap(), &[packet]);
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn a_merged_packet_stays_whole() {
    needs_root!("a_merged_packet_stays_whole");
    needs_tun!("a_merged_packet_stays_whole");
    let pair = Pair::new();
    let (gate, mut held, index) = attach(&pair, HoldOptions::default());
    let (local, remote) = ("10.9.0.1:7000", "10.9.0.2:5000");
    gate.add_flows(&[flow(local, remote)]).unwrap();
    gate.close().unwrap();
    let packet = Packet::tcp(remote, local, ACK)
        .with_data(5000)
        .with_lengths();
    // Checksum to be made from byte 34 on, stored 16 behind it; to be cut
    // into segments of 1000 bytes behind 54 of headers.
    let offload = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    let frame = [&offload[..], &packet.bytes()].concat();
    pair.client.run(|| {
        let socket = raw_socket("gate1");
        let on: libc::c_int = 1;
        // SAFETY: a live socket, and an int that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const on).cast(),
                4,
            )
        };
        assert_eq!(result, 0);
        nix::unistd::write(socket, &frame).unwrap();
    });
    let packet = next(&mut held).unwrap();
    assert_eq!(packet.frame.len(), frame.len());
    assert_eq!(packet.frame[..2], offload[..2]);
    assert_eq!(packet.frame[4..10], offload[4..]);
    assert_eq!(gate.counters().unwrap().held_ingress_packets, 5);
    gate.inject_ingress(index, &packet.frame).unwrap();
    assert_all_went_through(gate.counters().unwrap(), &[packet]);
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

/// A second host on the client's side of things: the client gets a bridge that
/// both are on.
fn second_server(pair: &Pair) -> Host {
    let other = Host::new();
    let client_net = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        pair.client.net.as_raw_fd()
    );
    other.run(|| {
        ip("link add gate0 type veth peer name gate2");
        ip(&format!("link set gate2 netns {client_net}"));
        ip("addr add 10.9.0.3/24 dev gate0");
        ip("link set gate0 up");
    });
    pair.client.run(|| {
        ip("link add bridge0 type bridge");
        ip("addr flush dev gate1");
        for port in ["gate1", "gate2"] {
            ip(&format!("link set {port} master bridge0"));
            ip(&format!("link set {port} up"));
        }
        ip("addr add 10.9.0.2/24 dev bridge0");
        ip("link set bridge0 up");
    });
    other
}

#[test]
fn what_one_host_holds_another_one_answers() {
    needs_root!("what_one_host_holds_another_one_answers");
    needs_tun!("what_one_host_holds_another_one_answers");
    const MOVING: &str = "10.9.0.100";
    let pair = Pair::new();
    let other = second_server(&pair);
    let address: SocketAddr = format!("{MOVING}:7000").parse().unwrap();
    let moving = listener(&address.to_string(), false);
    let add = || ip(&format!("addr add {MOVING}/32 dev gate0"));
    pair.server.run(add);
    let (source, mut held, _) = attach(&pair, HoldOptions::default());
    let (destination, there) = other.run(|| {
        // A strict host: the frame has to come from where its answer goes.
        std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").unwrap();
        let index = if_nametoindex("gate0").unwrap();
        let options = GateOptions {
            role: Role::Destination,
            hold: Some(HoldOptions::default()),
            // Another host, another file system.
            ..options(&pair.directory.with_extension("other"))
        };
        (Gate::attach(&[index], &options).unwrap(), index)
    });
    for gate in [&source, &destination] {
        gate.add_listeners(&[moving]).unwrap();
        gate.close().unwrap();
    }
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| pair.connect(address, PATIENCE).unwrap());
        let syn = next(&mut held).unwrap();
        pair.server
            .run(|| ip(&format!("addr del {MOVING}/32 dev gate0")));
        let listening = other.run(|| {
            add();
            TcpListener::bind(address).unwrap()
        });
        let hardware_address = other.run(|| mac("gate0"));
        pair.client.run(|| {
            ip(&format!(
                "neigh replace {MOVING} lladdr {hardware_address} dev bridge0"
            ));
        });
        destination.open_egress().unwrap();
        destination.inject_ingress(there, &syn.frame).unwrap();
        let mut client = connecting.join().unwrap();
        destination.open().unwrap();
        // The last step of the handshake was held there.
        let mut held_there = destination.held().unwrap();
        for packet in held_there.try_drain() {
            destination.inject_ingress(there, &packet.frame).unwrap();
        }
        let (server, _) = listening.accept().unwrap();
        client.write_all(b"x").unwrap();
        assert_eq!(read_one(&server, PATIENCE), Ok(b'x'));
    });
    let counters = destination.counters().unwrap();
    assert!(counters.injected >= 1, "{counters:?}");
    other.run(|| detach(destination));
    pair.server.run(|| detach(source));
    pair.assert_nothing_left();
}

/// The hardware address of a device of the calling thread's namespace.
fn mac(device: &str) -> String {
    let (_, address) = crate::sys::device_kind(device).unwrap();
    address.map(|byte| format!("{byte:02x}")).join(":")
}

#[test]
fn what_finds_no_room_is_dropped_and_counted() {
    needs_root!("what_finds_no_room_is_dropped_and_counted");
    needs_tun!("what_finds_no_room_is_dropped_and_counted");
    const BYTES: usize = 1 << 20;
    let pair = Pair::new();
    let bounds = HoldOptions {
        total_bytes_max: 16 << 10,
        flow_bytes_max: 4 << 10,
    };
    let (gate, mut held, index) = attach(&pair, bounds);
    let (client, server, _listening) = connected(&pair, &gate, "10.9.0.1:7000");
    gate.close().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| send_numbered(&client, BYTES));
        scope.spawn(|| receive_numbered(&server, BYTES, &AtomicUsize::new(0)));
        await_that("a full store", || gate.counters().unwrap().hold_dropped > 0);
        let mut all = Vec::new();
        release(&gate, &mut held, index, &mut all);
        // TCP sends again what was dropped.
    });
    let stats = held.stats();
    let counters = gate.counters().unwrap();
    assert!(stats.dropped_frames > 0 && stats.dropped_bytes > 0);
    assert_eq!(counters.hold_dropped, stats.dropped_frames);
    assert_eq!(counters.ingress_dropped_packets, 0);
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn what_the_kernel_has_no_room_for_is_counted() {
    needs_root!("what_the_kernel_has_no_room_for_is_counted");
    needs_tun!("what_the_kernel_has_no_room_for_is_counted");
    /// More than a device's ring.
    const FRAMES: u64 = 6000;
    /// Less than what a processor keeps for later (`net.core.netdev_max_backlog`).
    const AT_ONCE: u64 = 500;
    let pair = Pair::new();
    let (gate, mut held, _) = attach(&pair, HoldOptions::default());
    gate.add_flows(&[flow("10.9.0.1:7000", "10.9.0.2:5000")])
        .unwrap();
    gate.close().unwrap();
    let reading = gate.hold.as_ref().unwrap().stop_reading();
    let frame = Packet::tcp("10.9.0.2:5000", "10.9.0.1:7000", ACK).bytes();
    pair.client.run(|| {
        let socket = raw_socket("gate1");
        for sent in 1..=FRAMES {
            nix::unistd::write(&socket, &frame).unwrap();
            if sent % AT_ONCE == 0 {
                await_that("the last frame", || {
                    gate.counters().unwrap().held_ingress_packets == sent
                });
            }
        }
    });
    let dropped = {
        drop(reading);
        u64::try_from(held.try_drain().len()).unwrap()
    };
    let counters = gate.counters().unwrap();
    assert!(counters.hold_dropped > 0, "{counters:?}");
    assert_eq!(counters.hold_dropped + dropped, FRAMES, "{counters:?}");
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

/// A packet socket bound to a device of the calling thread's namespace.
fn raw_socket(device: &str) -> std::os::fd::OwnedFd {
    use std::os::fd::FromRawFd;
    let index = if_nametoindex(device).unwrap();
    // SAFETY: plain call; the result is checked.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(socket >= 0);
    // SAFETY: the kernel has just made this descriptor for us alone.
    let socket = unsafe { std::os::fd::OwnedFd::from_raw_fd(socket) };
    // SAFETY: all zeros is a value of this plain C structure.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_ifindex = i32::try_from(index).unwrap();
    // SAFETY: a live socket, and an address of the size given.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            u32::try_from(size_of_val(&address)).unwrap(),
        )
    };
    assert_eq!(result, 0);
    socket
}

#[test]
fn without_tun_the_gate_drops_and_says_why() {
    needs_root!("without_tun_the_gate_drops_and_says_why");
    let pair = Pair::new();
    let gate = pair.server.run(|| {
        std::fs::create_dir_all("/dev/net").unwrap();
        mount(
            Some("none"),
            "/dev/net",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        let options = GateOptions {
            hold: Some(HoldOptions::default()),
            ..options(&pair.directory)
        };
        Gate::attach(&[if_nametoindex("gate0").unwrap()], &options).unwrap()
    });
    assert!(!gate.holds());
    let reason = gate.drop_reason().unwrap();
    assert!(reason.contains("TAP device"), "{reason}");
    assert!(matches!(gate.held(), Err(GateError::NoHold { .. })));
    let refused = gate.inject_ingress(1, &[]);
    assert!(matches!(refused, Err(GateError::NoHold { .. })));

    let (client, server, _listening) = connected(&pair, &gate, "10.9.0.1:7000");
    gate.close().unwrap();
    (&client).write_all(b"x").unwrap();
    assert_eq!(
        read_one(&server, SILENCE),
        Err(std::io::ErrorKind::WouldBlock)
    );
    let counters = gate.counters().unwrap();
    assert!(counters.ingress_dropped_packets > 0);
    assert_eq!(counters.held_ingress_packets, 0);
    gate.open().unwrap();
    assert_eq!(read_one(&server, PATIENCE), Ok(b'x'));
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn without_an_ethernet_header_the_gate_drops() {
    needs_root!("without_an_ethernet_header_the_gate_drops");
    needs_tun!("without_an_ethernet_header_the_gate_drops");
    let pair = Pair::new();
    pair.server.run(|| {
        let _tun = tun("gate2");
        let options = GateOptions {
            hold: Some(HoldOptions::default()),
            ..options(&pair.directory)
        };
        let gate = Gate::attach(&[if_nametoindex("gate2").unwrap()], &options).unwrap();
        assert!(!gate.holds());
        assert!(gate.drop_reason().unwrap().contains("Ethernet"));
        detach(gate);
    });
    pair.assert_nothing_left();
}

#[test]
fn only_the_workloads_sound_frames_go_back() {
    needs_root!("only_the_workloads_sound_frames_go_back");
    needs_tun!("only_the_workloads_sound_frames_go_back");
    let pair = Pair::new();
    let (gate, _held, index) = attach(&pair, HoldOptions::default());
    assert!(matches!(gate.held(), Err(GateError::HeldTaken)));
    let (local, remote) = ("10.9.0.1:7000", "10.9.0.2:5000");
    gate.add_flows(&[flow(local, remote)]).unwrap();
    let frame = |from, to| {
        [
            vec![0; 10],
            Packet::tcp(from, to, ACK).with_lengths().bytes(),
        ]
        .concat()
    };
    let good = frame(remote, local);
    gate.inject_ingress(index, &good).unwrap();
    gate.emit_egress(index, &frame(local, remote)).unwrap();
    let refused = gate.inject_ingress(index, &frame(local, remote));
    assert!(matches!(refused, Err(GateError::ForeignFrame)));
    let refused = gate.inject_ingress(index, &good[..good.len() - 1]);
    assert!(matches!(refused, Err(GateError::BadFrame(_))));
    let refused = gate.inject_ingress(index + 1000, &good);
    assert!(matches!(refused, Err(GateError::NotHeld { .. })));
    let counters = gate.counters().unwrap();
    assert_eq!((counters.injected, counters.emitted), (1, 1));
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn the_end_of_who_is_answered_for_is_known() {
    needs_root!("the_end_of_who_is_answered_for_is_known");
    needs_tun!("the_end_of_who_is_answered_for_is_known");
    let pair = Pair::new();
    let (gate, _held, index) = attach(&pair, HoldOptions::default());
    let local = "10.9.0.1:7000";
    let remotes = ["10.9.0.2:5000", "10.9.0.2:5001", "10.9.0.2:5002"];
    let flows = remotes.map(|remote| flow(local, remote));
    let [ends, resets, begins] = remotes;
    gate.add_flows(&flows).unwrap();
    gate.answer_for(&flows).unwrap();
    let give = |from, flags| {
        let packet = Packet::tcp(from, local, flags).with_lengths();
        let frame = [vec![0; 10], packet.bytes()].concat();
        gate.inject_ingress(index, &frame).unwrap();
    };
    for remote in remotes {
        give(remote, ACK);
    }
    assert!(flows.iter().all(|flow| gate.end_heard_at(flow).is_none()));
    give(ends, FIN | ACK);
    give(resets, RST | ACK);
    give(begins, SYN);
    let heard = flows.map(|flow| gate.end_heard_at(&flow).is_some());
    assert_eq!(heard, [true, true, false]);
    let answered = flows.map(|flow| gate.answers_for(&flow).unwrap());
    assert_eq!(answered, [true, true, false]);
    gate.answer_no_more(&flows[1]).unwrap();
    assert_eq!(gate.end_heard_at(&flows[1]), None);
    assert!(!gate.answers_for(&flows[1]).unwrap());
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

/// On an interface that spreads what it receives over all CPUs they are queued
/// first; one that is down drops them.
#[test]
fn what_has_not_passed_the_gate_yet_is_told() {
    needs_root!("what_has_not_passed_the_gate_yet_is_told");
    needs_tun!("what_has_not_passed_the_gate_yet_is_told");
    const PACKETS: u64 = 200;
    let pair = Pair::new();
    let (gate, _held, index) = attach(&pair, HoldOptions::default());
    let (local, remote) = ("10.9.0.1:7000", "10.9.0.2:5000");
    gate.add_flows(&[flow(local, remote)]).unwrap();
    let packet = Packet::tcp(remote, local, ACK).with_lengths().bytes();
    let frame = [vec![0; 10], packet].concat();
    assert_eq!(gate.underway().unwrap(), 0);
    for _ in 0..PACKETS {
        gate.inject_ingress(index, &frame).unwrap();
    }
    await_that("the last packet", || gate.underway().unwrap() == 0);
    assert_eq!(gate.counters().unwrap().injected, PACKETS);
    pair.server.run(|| ip("link set gate0 down"));
    gate.inject_ingress(index, &frame).unwrap();
    assert_eq!(gate.underway().unwrap(), 1);
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

/// The owner moves them between threads and tasks.
#[test]
fn the_handles_can_be_sent() {
    fn sent<T: Send + Sync>() {}
    fn future<T: Send>(_: impl FnOnce(T) -> Box<dyn Future<Output = ()> + Send>) {}
    sent::<Gate>();
    sent::<HeldPackets>();
    future(|mut held: HeldPackets| {
        Box::new(async move {
            held.next().await;
        })
    });
}
