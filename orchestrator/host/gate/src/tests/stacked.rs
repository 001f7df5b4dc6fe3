//! Devices stacked on others. Kernels for servers have their drivers, and the
//! kernel of the machine that runs the tests may not: there these tests say so
//! and end. A virtual machine (`cargo xtask vm`) has them.

use std::fs;
use std::process::Command;
use std::time::Duration;

use super::hold::{await_within, question_and_answer_on, without_timers_over};
use super::network::{Host, Pair, ip, starting};

/// For the two ends of an aggregate: a protocol with timers of a second, in a
/// virtual machine that may be slow.
const AGREED_WITHIN: Duration = Duration::from_secs(120);

/// Whether there is a driver for devices of this kind.
fn has_driver(kind: &str) -> bool {
    let made = Host::new().run(|| {
        ip("link add probe0 type veth peer name probe1");
        let _starting = starting();
        let order = match kind {
            "vlan" => "link add link probe0 name probe2 type vlan id 7",
            _ => "link add probe2 type bond",
        };
        Command::new("ip").args(order.split(' ')).output().unwrap()
    });
    if !made.status.success() {
        println!("no driver for {kind} devices here");
    }
    made.status.success()
}

/// The pair's addresses on other devices, by the same names on both ends.
fn readdress(pair: &Pair, server: &str, client: &str) {
    let move_to = |host: &Host, device: &str, v4: &str, v6: &str| {
        host.run(|| {
            ip(&format!("addr add {v4} dev {device}"));
            ip(&format!("addr add {v6} dev {device} nodad"));
        });
    };
    move_to(&pair.server, server, "10.9.1.1/24", "fd00:9:1::1/64");
    move_to(&pair.client, client, "10.9.1.2/24", "fd00:9:1::2/64");
    without_timers_over(pair, [server, client], "10.9.1.0/24", "fd00:9:1::/64");
}

#[test]
fn a_vlan_is_gated() {
    needs_root!("a_vlan_is_gated");
    needs_tun!("a_vlan_is_gated");
    if !has_driver("vlan") {
        return;
    }
    for protocol in ["802.1Q", "802.1ad"] {
        let pair = Pair::new();
        for (host, lower) in [(&pair.server, "gate0"), (&pair.client, "gate1")] {
            host.run(|| {
                ip(&format!(
                    "link add link {lower} name vlan7 type vlan protocol {protocol} id 7"
                ));
                ip("link set vlan7 up");
            });
        }
        readdress(&pair, "vlan7", "vlan7");
        question_and_answer_on(&pair, "vlan7", "10.9.1.1:7000");
        question_and_answer_on(&pair, "vlan7", "[fd00:9:1::1]:7000");
        // The gate may sit on the device below as well: tags are looked through.
        question_and_answer_on(&pair, "gate0", "10.9.1.1:7001");
        question_and_answer_on(&pair, "gate0", "[fd00:9:1::1]:7001");
        println!("gated: vlan {protocol}");
    }
}

/// Waits until both ends of the aggregate have agreed on it. Until then the driver
/// drops packets now and then, as it changes its mind about its ports.
fn await_aggregation() {
    /// Collecting and distributing, of a port's state (IEEE 802.1AX, 6.4.2.3).
    const PASSES: u32 = 0x30;
    /// The states that are told: the port's own and its partner's.
    const STATES: usize = 2;
    await_within(AGREED_WITHIN, "the ends' agreement", || {
        let told = fs::read_to_string("/proc/thread-self/net/bonding/bond0").unwrap();
        let states = told.lines().filter_map(|line| {
            line.trim()
                .strip_prefix("port state: ")?
                .parse::<u32>()
                .ok()
        });
        states.filter(|state| state & PASSES == PASSES).count() == STATES
    });
}

#[test]
fn a_bond_is_gated() {
    needs_root!("a_bond_is_gated");
    needs_tun!("a_bond_is_gated");
    if !has_driver("bond") {
        return;
    }
    for mode in ["active-backup", "balance-rr", "802.3ad"] {
        let pair = Pair::new();
        for (host, member) in [(&pair.server, "gate0"), (&pair.client, "gate1")] {
            host.run(|| {
                ip(&format!("link add bond0 type bond mode {mode} miimon 10"));
                ip(&format!("link set {member} down"));
                ip(&format!("link set {member} master bond0"));
                ip("link set bond0 up");
            });
        }
        if mode == "802.3ad" {
            for host in [&pair.server, &pair.client] {
                host.run(await_aggregation);
            }
        }
        readdress(&pair, "bond0", "bond0");
        question_and_answer_on(&pair, "bond0", "10.9.1.1:7000");
        question_and_answer_on(&pair, "bond0", "[fd00:9:1::1]:7000");
        println!("gated: bond {mode}");
    }
}
