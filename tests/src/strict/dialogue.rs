//! One protocol on one connection, without sockets or time.

use std::collections::VecDeque;

use crate::echo_wire::scramble;

/// What to ask on one connection, and what must come back.
pub(super) trait Dialogue {
    /// Appends the next requests to `out` and says how many there are.
    fn ask(&mut self, out: &mut Vec<u8>) -> usize;

    /// Appends the last requests of the run.
    fn ask_last(&mut self, _out: &mut Vec<u8>) -> usize {
        0
    }

    /// Judges what stands at the front of the bytes received so far.
    fn judge(&mut self, input: &[u8]) -> Judged;
}

/// What the front of the received bytes is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Judged {
    /// The beginning of a reply.
    Incomplete,
    /// A whole reply.
    Reply {
        /// Bytes it takes.
        used: usize,
        /// Requests that need no longer wait: 1, or 0 for a reply that was not
        /// asked for, or more when replies were skipped.
        answered: usize,
        /// What is wrong with it.
        finding: Option<Finding>,
    },
    /// No reply at all: nothing that follows can be trusted.
    OutOfStep(Finding),
}

/// Something that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) text: String,
}

impl Finding {
    pub(super) fn wrong(text: String) -> Self {
        Self {
            lost: 0,
            doubled: 0,
            text,
        }
    }

    pub(super) fn lost(lost: u64, text: String) -> Self {
        Self {
            lost,
            doubled: 0,
            text,
        }
    }

    pub(super) fn doubled(doubled: u64, text: String) -> Self {
        Self {
            lost: 0,
            doubled,
            text,
        }
    }
}

/// Distance at which a counter is believed to have lost or repeated updates;
/// beyond it the reply itself must be damaged.
const DRIFT_MAX: u64 = 1_000;

/// A reply known in advance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expected {
    /// These bytes.
    Exact(Vec<u8>),
    /// A counter's value, whose drift shows updates lost or executed twice.
    Counter(u64),
}

/// The replies that a connection still owes, oldest first. For protocols whose
/// replies are known byte by byte.
#[derive(Debug)]
pub(super) struct Owed {
    queue: VecDeque<Expected>,
    /// The last right reply: the one that would come again.
    last: Vec<u8>,
    /// How a counter's value is written and read.
    counter_prefix: &'static [u8],
}

impl Owed {
    pub(super) fn new(counter_prefix: &'static [u8]) -> Self {
        Self {
            queue: VecDeque::new(),
            last: Vec::new(),
            counter_prefix,
        }
    }

    pub(super) fn push(&mut self, expected: Expected) {
        self.queue.push_back(expected);
    }

    /// Judges one whole reply. `counter` is the caller's own count behind
    /// [`Expected::Counter`], put right after a drift so that one loss is
    /// counted once.
    pub(super) fn judge(&mut self, frame: &[u8], counter: &mut u64) -> Judged {
        let (answered, finding) = self.compare(frame, counter);
        for _ in 0..answered {
            self.queue.pop_front();
        }
        if finding.is_none() {
            self.last = frame.to_vec();
        }
        Judged::Reply {
            used: frame.len(),
            answered,
            finding,
        }
    }

    fn compare(&self, frame: &[u8], counter: &mut u64) -> (usize, Option<Finding>) {
        let Some(front) = self.queue.front() else {
            let text = format!("a reply to no request: {}", Excerpt(frame));
            return (0, Some(Finding::doubled(1, text)));
        };
        let expected = self.render(front);
        if expected == frame {
            return (1, None);
        }
        let text = format!("expected {}, got {}", Excerpt(&expected), Excerpt(frame));
        if self.last == frame {
            return (
                0,
                Some(Finding::doubled(1, format!("a reply came again: {text}"))),
            );
        }
        if let Some(skipped) = self
            .queue
            .iter()
            .position(|later| self.render(later) == frame)
        {
            let lost = skipped as u64;
            return (
                skipped + 1,
                Some(Finding::lost(lost, format!("replies missing: {text}"))),
            );
        }
        if let Expected::Counter(wanted) = front
            && let Some(got) = self.counter_in(frame)
            && got.abs_diff(*wanted) <= DRIFT_MAX
        {
            let drift = got.abs_diff(*wanted);
            let finding = if got > *wanted {
                *counter = counter.saturating_add(drift);
                Finding::doubled(drift, format!("updates executed twice: {text}"))
            } else {
                *counter = counter.saturating_sub(drift);
                Finding::lost(drift, format!("updates lost: {text}"))
            };
            return (1, Some(finding));
        }
        (1, Some(Finding::wrong(text)))
    }

    /// Judges bytes that are no reply of the protocol.
    pub(super) fn out_of_step(&self, got: &[u8]) -> Judged {
        let expected: Vec<u8> = self
            .queue
            .iter()
            .flat_map(|owed| self.render(owed))
            .collect();
        let text = format!(
            "the stream is out of step: expected {}, got {}",
            Excerpt(&expected),
            Excerpt(got)
        );
        Judged::OutOfStep(match slip(&self.last, &expected, got) {
            Slip::Lost(bytes) => Finding::lost(1, format!("{bytes} bytes missing, {text}")),
            Slip::Doubled(bytes) => Finding::doubled(1, format!("{bytes} bytes again, {text}")),
            Slip::None => Finding::wrong(text),
        })
    }

    fn render(&self, expected: &Expected) -> Vec<u8> {
        match expected {
            Expected::Exact(bytes) => bytes.clone(),
            Expected::Counter(value) => {
                [self.counter_prefix, value.to_string().as_bytes(), b"\r\n"].concat()
            }
        }
    }

    fn counter_in(&self, frame: &[u8]) -> Option<u64> {
        let digits = frame
            .strip_prefix(self.counter_prefix)?
            .strip_suffix(b"\r\n")?;
        std::str::from_utf8(digits).ok()?.parse().ok()
    }
}

/// How a received stream left the expected one.
#[derive(Debug, PartialEq, Eq)]
enum Slip {
    Lost(usize),
    Doubled(usize),
    None,
}

/// Finds the shift after which `got` follows the expected bytes again. `last`
/// is what was received just before them.
fn slip(last: &[u8], expected: &[u8], got: &[u8]) -> Slip {
    let same = expected.iter().zip(got).take_while(|(a, b)| a == b).count();
    let stream = [last, expected].concat();
    let (here, rest) = (last.len() + same, &got[same..]);
    let follows = |from: usize| {
        let tail = &stream[from..];
        let compared = tail.len().min(rest.len());
        // Four bytes agree by chance once in four thousand million.
        (compared >= 4 || compared == rest.len())
            && compared > 0
            && tail[..compared] == rest[..compared]
    };
    if let Some(bytes) = (1..stream.len() - here).find(|bytes| follows(here + bytes)) {
        return Slip::Lost(bytes);
    }
    (1..=here)
        .find(|bytes| follows(here - bytes))
        .map_or(Slip::None, Slip::Doubled)
}

/// The first bytes of something, readable.
pub(super) struct Excerpt<'a>(pub(super) &'a [u8]);

impl std::fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN_BYTES: usize = 48;
        let shown = &self.0[..self.0.len().min(SHOWN_BYTES)];
        write!(f, "\"{}\"", shown.escape_ascii())?;
        if shown.len() < self.0.len() {
            write!(f, "… ({} bytes)", self.0.len())
        } else {
            Ok(())
        }
    }
}

/// Numbers that differ from call to call and repeat from run to run.
#[derive(Debug)]
pub(super) struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, thrown: 0 }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.thrown += 1;
        scramble(self.seed, self.thrown)
    }

    /// A number below `sides`.
    pub(super) fn below(&mut self, sides: u64) -> u64 {
        self.next() % sides
    }

    /// Printable bytes, `length` of them.
    pub(super) fn text(&mut self, length: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(length + 16);
        while text.len() < length {
            text.extend_from_slice(format!("{:016x}", self.next()).as_bytes());
        }
        text.truncate(length);
        text
    }

    /// How many requests to send at once: mostly one, every eighth time up to
    /// eight in a pipeline.
    pub(super) fn batch(&mut self) -> usize {
        if self.below(8) == 0 {
            usize::try_from(self.below(7)).unwrap_or(0) + 2
        } else {
            1
        }
    }
}

/// Most bytes of one line of a text protocol; none of ours is near it.
pub(super) const LINE_BYTES_MAX: usize = 512;

/// Bytes that cannot begin a reply of the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The length of the line at the front, its CRLF included; `None` while it is
/// incomplete.
pub(super) fn line(input: &[u8]) -> Result<Option<usize>, Malformed> {
    let window = &input[..input.len().min(LINE_BYTES_MAX)];
    match window.iter().position(|byte| *byte == b'\n') {
        Some(at) if at > 0 && window[at - 1] == b'\r' => Ok(Some(at + 1)),
        Some(_) => Err(Malformed),
        None if window.len() == LINE_BYTES_MAX => Err(Malformed),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owed(replies: &[Expected]) -> Owed {
        let mut owed = Owed::new(b":");
        replies.iter().for_each(|reply| owed.push(reply.clone()));
        owed
    }

    fn reply(judged: Judged) -> (usize, u64, u64) {
        match judged {
            Judged::Reply {
                answered, finding, ..
            } => {
                let (lost, doubled) = finding.map_or((0, 0), |f| (f.lost, f.doubled));
                (answered, lost, doubled)
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_reply_is_matched_repeated_or_skipped() {
        let mut owed = owed(&[
            Expected::Exact(b"+a\r\n".to_vec()),
            Expected::Exact(b"+b\r\n".to_vec()),
            Expected::Exact(b"+c\r\n".to_vec()),
        ]);
        let counter = &mut 0;
        assert_eq!(reply(owed.judge(b"+a\r\n", counter)), (1, 0, 0));
        assert_eq!(reply(owed.judge(b"+a\r\n", counter)), (0, 0, 1));
        assert_eq!(reply(owed.judge(b"+c\r\n", counter)), (2, 1, 0));
        assert_eq!(reply(owed.judge(b"+c\r\n", counter)), (0, 0, 1));
    }

    #[test]
    fn a_counter_that_drifts_is_counted_once() {
        let mut owed = owed(&[Expected::Counter(10)]);
        let mut counter = 10;
        assert_eq!(reply(owed.judge(b":7\r\n", &mut counter)), (1, 3, 0));
        assert_eq!(counter, 7);
        owed.push(Expected::Counter(8));
        assert_eq!(reply(owed.judge(b":8\r\n", &mut counter)), (1, 0, 0));
        owed.push(Expected::Counter(9));
        assert_eq!(reply(owed.judge(b":11\r\n", &mut counter)), (1, 0, 2));
        owed.push(Expected::Counter(12));
        assert_eq!(reply(owed.judge(b":912345\r\n", &mut counter)), (1, 0, 0));
    }

    #[test]
    fn a_slip_is_named() {
        assert_eq!(
            slip(b"+ok\r\n", b"abcdefgh\r\n", b"abdefgh\r\n"),
            Slip::Lost(1)
        );
        assert_eq!(
            slip(b"+ok\r\n", b"abcdefgh\r\n", b"abccdefgh\r\n"),
            Slip::Doubled(1)
        );
        assert_eq!(slip(b"+ok\r\n", b"", b"\n"), Slip::Doubled(1));
        assert_eq!(
            slip(b"+ok\r\n", b"abcdefgh\r\n", b"abXdefgh\r\n"),
            Slip::None
        );
    }

    #[test]
    fn a_line_ends_with_both_characters() {
        assert_eq!(line(b"+ok\r\n:1"), Ok(Some(5)));
        assert_eq!(line(b"+ok\r"), Ok(None));
        assert_eq!(line(b"\n+ok\r\n"), Err(Malformed));
        assert_eq!(line(&[b'x'; LINE_BYTES_MAX]), Err(Malformed));
    }
}
