//! Peers whose TCP is not the usual one: tiny windows, no timestamps, no
//! selective acknowledgements, small and jumbo segments, a bridge under the
//! address. Each test proves first that its condition is in force.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, Lab, LabGuard};
use migrate_tests::hosts::{eventually, reset_connections};
use migrate_tests::migration::{migrate, moves, serves_old_connections};
use migrate_tests::refusals::{REFUSED, shell};
use migrate_tests::require;
use migrate_tests::workload::{Kind, Workload};
use serde_json::Value;

const CONNECTIONS: usize = 10;

fn lab(test: &str) -> LabGuard {
    Lab::scoped(&format!("peers-{test}-{}", std::process::id())).unwrap()
}

/// The client's sockets as `ss` describes them, one a line.
fn sockets(client: &Host) -> Vec<String> {
    shell(client, "ss -tinmOH state established dst 10.77.0.100")
        .lines()
        .map(str::to_owned)
        .collect()
}

/// The number behind `name` in a line of `ss`.
fn number(line: &str, name: &str) -> u32 {
    let (_, rest) = line.split_once(name).unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

/// Moves there and back with strict clients of such a TCP. `is_odd` tells of
/// each of the client's sockets whether it is as wanted.
fn moves_there_and_back(lab: &Lab, kind: Kind, is_odd: impl Fn(&str) -> bool) -> Vec<Report> {
    let workload = Workload::start(kind, lab).unwrap();
    // Few keys: where a window is smaller than a segment, a sender may have to
    // wait for its timer, 200 ms, before each one.
    let more: &[&str] = match kind {
        Kind::Redis => &["--keys", "1000", "--populate", "--verify"],
        _ => &[],
    };
    let mut client = workload.client(lab, CONNECTIONS, more).unwrap();
    let here = lab.host(HostName::Client);
    let resets = reset_connections(&here).unwrap();
    serves_old_connections(&mut client);
    let seen = sockets(&here);
    assert!(seen.len() >= CONNECTIONS, "{seen:#?}");
    assert!(seen.iter().all(|line| is_odd(line)), "{seen:#?}");
    let mut reports = Vec::new();
    for (from, to) in [
        (HostName::Host1, HostName::Host2),
        (HostName::Host2, HostName::Host1),
    ] {
        let report = moves(lab, &workload, from, to);
        let noticed = report.continuity.as_ref().unwrap();
        println!(
            "{to}: {}, silent {:?} us, {} segments again, quiet {}",
            report.blackout, noticed.silence_us, noticed.repeated_segments, noticed.was_quiet
        );
        assert_eq!(report.connections, 10, "{report:?}");
        assert_eq!(report.dropped_packets, 0, "{report:?}");
        serves_old_connections(&mut client);
        reports.push(report);
    }
    let verdict = client.stop().unwrap();
    println!("{verdict}");
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(reset_connections(&here).unwrap(), resets);
    reports
}

#[test]
fn peers_with_tiny_windows_are_kept() {
    require!("peers_with_tiny_windows_are_kept": root, tcx, criu, migrate, redis, ss);
    let lab = lab("tiny");
    // Room for three segments. With less than one's (2304 bytes), a connection that
    // fills a redis has stood still for more than a minute, without any migration.
    for host in HostName::ALL {
        shell(
            &lab.host(host),
            "sysctl -qw net.ipv4.tcp_rmem='8192 8192 8192'",
        );
    }
    moves_there_and_back(&lab, Kind::Redis, |socket| number(socket, ",rb") <= 8192);
}

#[test]
fn peers_without_timestamps_are_kept() {
    require!("peers_without_timestamps_are_kept": root, tcx, criu, migrate, ss);
    let lab = lab("no-ts");
    shell(
        &lab.host(HostName::Client),
        "sysctl -qw net.ipv4.tcp_timestamps=0",
    );
    moves_there_and_back(&lab, Kind::Echo, |socket| !socket.contains(" ts "));
}

#[test]
fn peers_without_selective_acknowledgements_are_kept() {
    require!("peers_without_selective_acknowledgements_are_kept": root, tcx, criu, migrate, ss);
    let lab = lab("no-sack");
    shell(
        &lab.host(HostName::Client),
        "sysctl -qw net.ipv4.tcp_sack=0",
    );
    moves_there_and_back(&lab, Kind::Echo, |socket| !socket.contains(" sack "));
}

#[test]
fn peers_with_a_clamped_segment_size_are_kept() {
    require!("peers_with_a_clamped_segment_size_are_kept": root, tcx, criu, migrate, redis, ss);
    let lab = lab("mss");
    // As a gateway on the way does, the client asks for small segments; the
    // servers do so as well.
    for host in HostName::ALL {
        shell(
            &lab.host(host),
            "ip route replace 10.77.0.0/24 dev eth0 proto kernel scope link \
             src $(ip -4 -o address show dev eth0 primary | tr / ' ' | awk '{print $4; exit}') \
             advmss 536",
        );
    }
    moves_there_and_back(&lab, Kind::Redis, |socket| number(socket, " mss:") <= 536);
}

#[test]
fn peers_with_jumbo_frames_are_kept() {
    require!("peers_with_jumbo_frames_are_kept": root, tcx, criu, migrate, redis, ss);
    let lab = lab("jumbo");
    lab.set_mtu(9000).unwrap();
    moves_there_and_back(&lab, Kind::Redis, |socket| number(socket, " mss:") > 8000);
}

#[test]
fn an_address_on_a_bridge_moves() {
    require!("an_address_on_a_bridge_moves": root, tcx, criu, migrate, ss);
    let lab = lab("bridge");
    for host in [HostName::Host1, HostName::Host2] {
        // The host's interface becomes a port, its addresses the bridge's.
        shell(
            &lab.host(host),
            "set -e
             ip link add br0 address $(cat /sys/class/net/eth0/address) type bridge \
                stp_state 0 forward_delay 0 mcast_snooping 0
             ip -4 -o address show dev eth0 | awk '{print $4}' >/run/addresses
             ip -4 address flush dev eth0
             ip link set eth0 master br0
             ip link set br0 up
             while read address; do ip address add $address dev br0; done </run/addresses
             rm /run/addresses",
        );
    }
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let mut client = workload.client(&lab, CONNECTIONS, &[]).unwrap();
    serves_old_connections(&mut client);
    let pid = workload.pid.to_string();
    for (from, to) in [
        (HostName::Host1, HostName::Host2),
        (HostName::Host2, HostName::Host1),
    ] {
        let migration = migrate(&lab.host(from), ["--to", to.as_str(), &pid]).unwrap();
        let report = migration.expect_committed();
        let noticed = report.continuity.as_ref().unwrap();
        println!(
            "{to}: {}, silent {:?} us, {} segments again, quiet {}",
            report.blackout, noticed.silence_us, noticed.repeated_segments, noticed.was_quiet
        );
        assert!(report.held_packets > 0, "{report:?}");
        let on_bridge = shell(&lab.host(to), "ip -4 -o address show dev br0");
        assert!(on_bridge.contains("10.77.0.100/"), "{on_bridge}");
        serves_old_connections(&mut client);
    }
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
}

#[test]
fn a_peer_on_the_same_host_is_refused_by_name() {
    require!("a_peer_on_the_same_host_is_refused_by_name": root, tcx, criu, migrate, python);
    let lab = lab("loopback");
    let workload = Workload::start(Kind::Echo, &lab).unwrap();
    let host = lab.host(HostName::Host1);
    let pid = workload.pid.to_string();
    let peer = "import socket, time
s = socket.create_connection(('10.77.0.100', 7000))
time.sleep(600)";
    let check = || host.exec(["migrate", "check", "--json", &pid]).unwrap();
    let listed = || -> Vec<Value> {
        String::from_utf8_lossy(&check().stdout)
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .filter(|event: &Value| event["event"] == "socket")
            .collect()
    };
    assert_eq!(listed().len(), 1, "the listener");
    host.spawn_detached(["/usr/bin/python3", "-c", peer], "/dev/null")
        .unwrap();
    let limit = std::time::Duration::from_secs(20);
    assert!(eventually(limit, || listed().len() == 2), "{:?}", listed());
    let check = check();
    assert_eq!(check.status.code(), Some(REFUSED), "{check:?}");
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(
        said.contains("1 connection with a process on this host that does not move along"),
        "{said}"
    );
    let sockets = listed();
    assert_eq!(sockets[0]["state"], "LISTEN", "{sockets:?}");
    assert_eq!(sockets[0]["local"], "10.77.0.100:7000", "{sockets:?}");
    assert_eq!(sockets[1]["state"], "ESTAB", "{sockets:?}");
}

/// The same for a person, and what a round says of connections.
#[test]
fn connections_are_shown_before_and_while_a_tree_moves() {
    require!("connections_are_shown_before_and_while_a_tree_moves": root, tcx, criu, migrate, redis);
    let lab = lab("shown");
    let workload = Workload::start(Kind::Redis, &lab).unwrap();
    let mut client = workload.client(&lab, 20, &[]).unwrap();
    serves_old_connections(&mut client);
    // One that says nothing.
    let idle = lab
        .host(HostName::Client)
        .in_network(|| std::net::TcpStream::connect(workload.kind.address()).unwrap());
    let host = lab.host(HostName::Host1);
    let table = shell(&host, &format!("migrate check {}", workload.pid));
    assert!(table.contains("LISTEN"), "{table}");
    // The listener and 21 connections, of which ten lines are shown.
    assert!(table.contains("  … and 12 more\n"), "{table}");

    let arguments = [
        "--max-iterations",
        "4",
        "--goal",
        "101",
        "--to",
        "host2",
        &workload.pid.to_string(),
    ];
    let migration = migrate(&host, arguments).unwrap();
    let report = migration.expect_committed();
    let rounds: Vec<&Value> = migration
        .events
        .iter()
        .filter(|event| event["event"] == "round")
        .collect();
    assert_eq!(rounds.len(), 4, "{rounds:#?}");
    for round in &rounds {
        assert_eq!(round["flows"], 21, "{round}");
        // All but the silent one may have spoken in a round.
        assert!(round["dirty_flows"].as_u64().unwrap() <= 20, "{round}");
    }
    assert!(
        rounds.iter().any(|round| round["dirty_flows"] != 0),
        "{rounds:#?}"
    );

    let continuity = report.continuity.as_ref().unwrap();
    assert_eq!(continuity.flows, 21, "{continuity:?}");
    assert!(continuity.both_hosts, "{continuity:?}");
    assert_eq!(continuity.resets, 0, "{continuity:?}");
    // Whoever has spoken into the blackout was answered after it.
    let waited = continuity.worst.iter().filter(|flow| flow.held_packets > 0);
    for flow in waited {
        // It may not have been before the destination has told what it saw.
        if let Some(silence_us) = flow.silence_us {
            let frozen_us = report.blackout.dump_us + report.blackout.restore_us;
            assert!(silence_us > frozen_us, "{flow:?} {:?}", report.blackout);
        }
        assert!(flow.returned_packets > 0, "{flow:?}");
        assert_eq!(flow.dropped_packets, 0, "{flow:?}");
    }
    let held: u64 = continuity.worst.iter().map(|flow| flow.held_packets).sum();
    assert_eq!(held, report.held_packets, "{continuity:?}");
    serves_old_connections(&mut client);
    drop(idle);
    assert!(client.stop().unwrap().is_clean());
}
