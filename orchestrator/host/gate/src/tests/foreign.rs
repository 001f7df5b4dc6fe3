//! Beside programs of others, on tcx hooks and on clsact, attached before the
//! gate and after it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::net::if_::if_nametoindex;

use super::hold::{question_and_answer_on, without_timers};
use super::network::{PATIENCE, Pair, SILENCE, detach, options};
use crate::sys;
use crate::{Direction, Gate};

/// `TC_ACT_OK`: the packet passes, and no program behind is asked.
const FINAL: i32 = 0;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;
/// `BPF_F_BEFORE`: in front of all others.
const BEFORE: u32 = 1 << 3;
/// `BPF_F_AFTER`: behind them.
const AFTER: u32 = 1 << 4;

/// A program that says the same about every packet.
struct Foreign(OwnedFd);

impl Foreign {
    fn load(verdict: i32) -> Self {
        /// Of `union bpf_attr`: `BPF_PROG_LOAD`.
        #[repr(C)]
        struct Load {
            kind: u32,
            instructions: u32,
            code: u64,
            license: u64,
            log: [u64; 2],
        }
        // r0 = verdict; exit
        let verdict = u64::from(verdict.cast_unsigned()) << 32;
        let code = [verdict | 0xb7, 0x95_u64];
        let mut load = Load {
            kind: 3,
            instructions: 2,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            log: [0; 2],
        };
        Self(bpf(5, &mut load).unwrap())
    }

    /// Onto a tcx hook, for as long as the link lives.
    fn attach(&self, device: &str, direction: Direction, flags: u32) -> OwnedFd {
        /// Of `union bpf_attr`: `BPF_LINK_CREATE`.
        #[repr(C)]
        struct Create {
            program: u32,
            device: u32,
            hook: u32,
            flags: u32,
            relative: [u64; 2],
        }
        let mut create = Create {
            program: self.0.as_raw_fd().cast_unsigned(),
            device: if_nametoindex(device).unwrap(),
            hook: match direction {
                Direction::Ingress => 46,
                Direction::Egress => 47,
            },
            flags,
            relative: [0; 2],
        };
        bpf(28, &mut create).unwrap()
    }

    /// As a filter on clsact, as other tools have done it for years.
    fn filter(&self, device: &str, direction: Direction, pin: &Path) {
        /// Of `union bpf_attr`: `BPF_OBJ_PIN`.
        #[repr(C)]
        struct Pin {
            path: u64,
            object: u32,
            flags: u32,
        }
        let path = std::ffi::CString::new(pin.to_str().unwrap()).unwrap();
        let mut attributes = Pin {
            path: path.as_ptr() as u64,
            object: self.0.as_raw_fd().cast_unsigned(),
            flags: 0,
        };
        // SAFETY: as `sys::bpf` asks: the path lives through the call.
        unsafe { sys::bpf(6, &mut attributes) }.unwrap();
        let hook = match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let pin = pin.to_str().unwrap();
        // It may be there already.
        let _ = tc(&format!("qdisc add dev {device} clsact"));
        let order = format!("filter add dev {device} {hook} prio 1 bpf da object-pinned {pin}");
        tc(&order).unwrap();
    }
}

/// Takes a program off its hook: the last one that has the link does.
fn take_off(link: OwnedFd) {
    let _starting = super::network::starting();
    drop(link);
}

/// For commands that make something.
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the callers here give the structure of the command, with
    // pointers that live through the call.
    let made = unsafe { sys::bpf(command, attributes) }?;
    // SAFETY: the kernel has made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(made).unwrap()) })
}

fn tc(order: &str) -> Result<String, String> {
    let _starting = super::network::starting();
    let output = Command::new("tc").args(order.split(' ')).output().unwrap();
    if output.status.success() {
        Ok(String::from_utf8(output.stdout).unwrap())
    } else {
        Err(format!("tc {order}: {output:?}"))
    }
}

const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

#[test]
fn filters_of_others_come_behind_the_gate() {
    needs_root!("filters_of_others_come_behind_the_gate");
    needs_tun!("filters_of_others_come_behind_the_gate");
    let pair = Pair::new();
    let pins = tempfile::tempdir().unwrap();
    let foreign = Foreign::load(FINAL);
    pair.server.run(|| {
        mount(
            Some("bpf"),
            pins.path(),
            Some("bpf"),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
        for direction in BOTH {
            let pin = pins.path().join(format!("{direction:?}").to_lowercase());
            foreign.filter("gate0", direction, &pin);
        }
    });
    let filters = || {
        pair.server.run(|| {
            ["ingress", "egress"].map(|hook| tc(&format!("filter show dev gate0 {hook}")).unwrap())
        })
    };
    let before = filters();
    assert!(before.iter().all(|text| text.contains("direct-action")));
    // They would let the packets pass that are to be held.
    without_timers(&pair);
    question_and_answer_on(&pair, "gate0", "10.9.0.1:7000");
    assert_eq!(
        filters(),
        before,
        "the filters of others stay, and nothing else"
    );
}

#[test]
fn programs_of_others_come_behind_the_gate() {
    needs_root!("programs_of_others_come_behind_the_gate");
    needs_tun!("programs_of_others_come_behind_the_gate");
    if !crate::has_tcx() {
        return;
    }
    let pair = Pair::new();
    let foreign = Foreign::load(FINAL);
    let links = pair
        .server
        .run(|| BOTH.map(|direction| foreign.attach("gate0", direction, BEFORE)));
    without_timers(&pair);
    question_and_answer_on(&pair, "gate0", "10.9.0.1:7000");
    assert_eq!(pair.programs(), links.len());
}

#[test]
fn an_open_gate_leaves_packets_to_programs_behind() {
    needs_root!("an_open_gate_leaves_packets_to_programs_behind");
    if !crate::has_tcx() {
        return;
    }
    let pair = Pair::new();
    let gate = pair.server.run(|| {
        let index = if_nametoindex("gate0").unwrap();
        Gate::attach(&[index], &options(&pair.directory)).unwrap()
    });
    let listening = pair.listen("10.9.0.1:7000");
    let address: SocketAddr = listening.local_addr().unwrap();
    pair.connect(address, PATIENCE).unwrap();
    let link = pair
        .server
        .run(|| Foreign::load(SHOT).attach("gate0", Direction::Ingress, AFTER));
    assert!(pair.server.run(|| gate.is_in_place()));
    let refused = pair.connect(address, SILENCE).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::TimedOut);
    take_off(link);
    pair.connect(address, PATIENCE).unwrap();
    pair.server.run(|| detach(gate));
    pair.assert_nothing_left();
}

#[test]
fn a_program_in_front_is_noticed() {
    needs_root!("a_program_in_front_is_noticed");
    if !crate::has_tcx() {
        return;
    }
    let pair = Pair::new();
    let foreign = Foreign::load(FINAL);
    for direction in BOTH {
        let gate = pair.server.run(|| {
            let index = if_nametoindex("gate0").unwrap();
            Gate::attach(&[index], &options(&pair.directory)).unwrap()
        });
        assert!(pair.server.run(|| gate.is_in_place()));
        let link = pair
            .server
            .run(|| foreign.attach("gate0", direction, BEFORE));
        assert!(!pair.server.run(|| gate.is_in_place()), "{direction:?}");
        take_off(link);
        assert!(pair.server.run(|| gate.is_in_place()), "{direction:?}");
        pair.server.run(|| detach(gate));
        pair.assert_nothing_left();
    }
}
