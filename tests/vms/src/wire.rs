//! What the machine and a guest's agent say to each other over a serial port.
//!
//! A port carries one command at a time. A frame is a head of 20 bytes and at most
//! [`PAYLOAD_BYTES_MAX`] of payload; all numbers are little-endian.
//!
//! ```text
//!   magic 4   kind 1   0 0 0   session 8   length 4   payload
//! ```
//!
//! Whoever connects begins with [`Kind::Exec`] under a session number that nobody had before. What
//! an earlier session left in the port is so told apart and skipped.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

const MAGIC: [u8; 4] = *b"mvm1";
const HEAD_BYTES: usize = 20;
/// A longer frame is none of ours.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// To the guest: run this. The payload is a [`Job`].
    Exec,
    /// To the guest: for the command's standard input. Empty: its end.
    Stdin,
    /// From the guest: the command runs. The payload is its PID in decimal.
    Started,
    /// From the guest.
    Stdout,
    /// From the guest.
    Stderr,
    /// From the guest, last: the exit code in decimal, 128 and the signal's number for a signal.
    Exit,
    /// From the guest, last: why it could not be started.
    Failed,
}

impl Kind {
    const fn byte(self) -> u8 {
        match self {
            Self::Exec => 1,
            Self::Stdin => 2,
            Self::Started => 16,
            Self::Stdout => 17,
            Self::Stderr => 18,
            Self::Exit => 19,
            Self::Failed => 20,
        }
    }

    fn parse(byte: u8) -> Option<Self> {
        [
            Self::Exec,
            Self::Stdin,
            Self::Started,
            Self::Stdout,
            Self::Stderr,
            Self::Exit,
            Self::Failed,
        ]
        .into_iter()
        .find(|kind| kind.byte() == byte)
    }
}

/// A command to run in a guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    /// The program and its arguments.
    pub(crate) argv: Vec<String>,
    /// Beside the guest's own.
    pub(crate) env: Vec<(String, String)>,
    /// Where a daemon's output goes. A daemon's parent is the guest's init; the command is over
    /// when it has started.
    pub(crate) daemon_log: Option<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) session: u64,
    pub(crate) kind: Kind,
    pub(crate) payload: Vec<u8>,
}

pub(crate) fn write(
    mut to: impl Write,
    session: u64,
    kind: Kind,
    payload: &[u8],
) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= PAYLOAD_BYTES_MAX)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mut frame = Vec::with_capacity(HEAD_BYTES + payload.len());
    frame.extend(MAGIC);
    frame.extend([kind.byte(), 0, 0, 0]);
    frame.extend(session.to_le_bytes());
    frame.extend(length.to_le_bytes());
    frame.extend(payload);
    // One call: the frames of two threads do not mix.
    to.write_all(&frame)
}

/// The next frame. Bytes that are none are skipped: the end of one that was cut off.
pub(crate) fn read(mut from: impl Read) -> io::Result<Frame> {
    let mut head = [0; HEAD_BYTES];
    from.read_exact(&mut head)?;
    loop {
        if let Some((kind, session, length)) = parse(&head) {
            let mut payload = vec![0; length];
            from.read_exact(&mut payload)?;
            return Ok(Frame {
                session,
                kind,
                payload,
            });
        }
        head.copy_within(1.., 0);
        from.read_exact(&mut head[HEAD_BYTES - 1..])?;
    }
}

fn parse(head: &[u8; HEAD_BYTES]) -> Option<(Kind, u64, usize)> {
    let (magic, rest) = head.split_first_chunk::<4>()?;
    let (kind, rest) = rest.split_first_chunk::<4>()?;
    let (session, rest) = rest.split_first_chunk::<8>()?;
    let length = u32::from_le_bytes(*rest.first_chunk::<4>()?);
    let length = usize::try_from(length)
        .ok()
        .filter(|length| *length <= PAYLOAD_BYTES_MAX)?;
    let kind = Kind::parse(kind[0]).filter(|_| *magic == MAGIC && kind[1..] == [0, 0, 0])?;
    Some((kind, u64::from_le_bytes(*session), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_behind_the_rest_of_a_cut_one() {
        let mut bytes = Vec::new();
        write(&mut bytes, 1, Kind::Stdout, b"from an earlier session").unwrap();
        bytes.drain(..7);
        write(&mut bytes, 2, Kind::Stdin, b"").unwrap();
        write(&mut bytes, 2, Kind::Exit, b"0").unwrap();
        let mut from = bytes.as_slice();
        for (kind, payload) in [(Kind::Stdin, &b""[..]), (Kind::Exit, b"0")] {
            let frame = read(&mut from).unwrap();
            assert_eq!(
                frame,
                Frame {
                    session: 2,
                    kind,
                    payload: payload.to_vec()
                }
            );
        }
        assert_eq!(
            read(&mut from).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_frame_has_a_bound() {
        let too_long = vec![0; PAYLOAD_BYTES_MAX + 1];
        assert!(write(io::sink(), 1, Kind::Stdin, &too_long).is_err());
    }
}
