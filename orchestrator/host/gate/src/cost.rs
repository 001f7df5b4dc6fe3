//! What a packet costs at the gate, for benchmarks: the kernel runs the
//! programs on hand-made frames and takes the mean.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions};
use migrate_core::Flow;
use migrate_ebpf_common::Direction;

use crate::sys::DeviceKind;
use crate::{GateError, load_program, tables};

/// How often a frame is run.
const REPEAT: u32 = 1_000_000;

/// The kernel gives a long run up when a signal arrives
/// (`bpf_test_timer_continue`), which a loaded machine makes likely: it is
/// begun anew so often.
const TRIES: u32 = 10;

/// The host's own address in the frames, and a port that is no flow's.
const HOST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 77, 0, 100), 6379);
const OTHER_PORT: u16 = 22;

/// Whose packet it is, at a gate that lets everything pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// One of the tree's connections, counted: pre-copy.
    Tracked,
    /// The same with a look at sequence numbers: shortly before the blackout.
    Watched,
    /// One that has nothing to do with the tree.
    Foreign,
}

/// The mean of a million runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketCost {
    /// Connections that the gate knew.
    pub flows: u32,
    /// From the peer or to it.
    pub direction: Direction,
    /// Whose packet.
    pub case: Case,
    /// What the gate took for it, in nanoseconds.
    pub ns: u64,
}

/// Measures the open gate with so many connections in its table, on programs
/// of its own that are attached nowhere and gone afterwards.
///
/// # Errors
///
/// The kernel refuses the programs, or will not run them: it wants root.
pub fn open_gate(flows: u32) -> Result<Vec<PacketCost>, GateError> {
    let (mut ebpf, tables) = tables::load(flows, 0)?;
    let of_tree: Vec<Flow> = (0..flows)
        .map(|number| Flow::new(HOST.into(), peer(number).into()))
        .collect();
    tables.add_flows(&of_tree)?;
    tables.start_tracking();

    for direction in [Direction::Ingress, Direction::Egress] {
        load_program(&mut ebpf, direction, DeviceKind::Ethernet)?;
    }
    let mut costs = Vec::new();
    for case in [Case::Foreign, Case::Tracked, Case::Watched] {
        let port = match case {
            Case::Foreign => OTHER_PORT,
            Case::Tracked => HOST.port(),
            Case::Watched => {
                tables.start_watching();
                HOST.port()
            }
        };
        let host = SocketAddrV4::new(*HOST.ip(), port);
        let peer = peer(flows / 2);
        for direction in [Direction::Ingress, Direction::Egress] {
            let (name, frame) = match direction {
                Direction::Ingress => ("gate_ingress", frame(peer, host)),
                Direction::Egress => ("gate_egress", frame(host, peer)),
            };
            let before = tables.counters()?.tracked_packets;
            let ns = mean_ns(program(&mut ebpf, name)?, &frame)?;
            let counted = tables.counters()?.tracked_packets - before;
            if (counted == 0) != (case == Case::Foreign) {
                let what = format!("{counted} packets counted, {case:?} {direction:?}");
                return Err(GateError::Load(what.into()));
            }
            costs.push(PacketCost {
                flows,
                direction,
                case,
                ns,
            });
        }
    }
    Ok(costs)
}

/// Ten thousand ports of an address, then the next address.
const PORTS: u32 = 10_000;

fn peer(number: u32) -> SocketAddrV4 {
    let first = Ipv4Addr::new(10, 78, 0, 0).to_bits();
    // At most 49,999.
    let port = u16::try_from(40_000 + number % PORTS).unwrap_or(u16::MAX);
    SocketAddrV4::new(Ipv4Addr::from_bits(first + number / PORTS), port)
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, GateError> {
    let program = ebpf.program_mut(name).map(TryInto::try_into);
    let failed = || GateError::Load(format!("the object has no program {name}").into());
    program.and_then(Result::ok).ok_or_else(failed)
}

/// A bare acknowledgement.
fn frame(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0];
    frame.extend([0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
    frame.extend(from.ip().octets());
    frame.extend(to.ip().octets());
    frame.extend(from.port().to_be_bytes());
    frame.extend(to.port().to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    frame
}

/// What a program takes for a frame, the mean of [`REPEAT`] runs.
pub(crate) fn mean_ns(program: &mut SchedClassifier, frame: &[u8]) -> Result<u64, GateError> {
    let mut tries_left = TRIES;
    loop {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = REPEAT;
        match program.test_run(options) {
            Ok(result) => return Ok(u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX)),
            Err(ProgramError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::Interrupted && tries_left > 1 =>
            {
                tries_left -= 1;
            }
            Err(error) => return Err(GateError::Load(error.into())),
        }
    }
}
