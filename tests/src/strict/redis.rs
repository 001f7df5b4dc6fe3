//! RESP: INCR, SET, GET and ECHO, alone and in pipelines.

use super::dialogue::{Dialogue, Dice, Expected, Judged, Malformed, Owed, line};
use super::keys::{Store, VALUE_BYTES_MAX};
use crate::echo_wire::scramble;

pub(super) struct Redis {
    counter_key: String,
    value_key: String,
    /// The counter's value once every request sent so far is executed.
    counter: u64,
    /// The value once every request sent so far is executed.
    value: Vec<u8>,
    /// Whether the value was read since it was set. It is not set again before
    /// that: a SET that went astray would not be seen.
    read: bool,
    dice: Dice,
    owed: Owed,
}

impl Redis {
    pub(super) fn new(run: u64, connection: usize) -> Self {
        Self {
            counter_key: format!("strict:{run:x}:{connection}:counter"),
            value_key: format!("strict:{run:x}:{connection}:value"),
            counter: 0,
            value: Vec::new(),
            read: true,
            dice: Dice::new(scramble(run, connection as u64)),
            owed: Owed::new(b":"),
        }
    }

    fn ask_one(&mut self, out: &mut Vec<u8>) {
        match self.dice.below(5) {
            0 | 1 => self.increment(out),
            2 | 3 if self.read => {
                let length = usize::try_from(self.dice.below(200)).unwrap_or(0) + 16;
                self.value = self.dice.text(length);
                self.read = false;
                command(&[b"SET", self.value_key.as_bytes(), &self.value], out);
                self.owed.push(Expected::Exact(b"+OK\r\n".to_vec()));
            }
            2 | 3 => self.get(out),
            _ => {
                let nonce = self.dice.text(24);
                command(&[b"ECHO", &nonce], out);
                self.owed.push(Expected::Exact(bulk(&nonce)));
            }
        }
    }

    fn increment(&mut self, out: &mut Vec<u8>) {
        command(&[b"INCR", self.counter_key.as_bytes()], out);
        self.counter += 1;
        self.owed.push(Expected::Counter(self.counter));
    }

    fn get(&mut self, out: &mut Vec<u8>) {
        self.read = true;
        command(&[b"GET", self.value_key.as_bytes()], out);
        self.owed.push(Expected::Exact(bulk(&self.value)));
    }
}

impl Dialogue for Redis {
    fn ask(&mut self, out: &mut Vec<u8>) -> usize {
        let batch = self.dice.batch();
        for _ in 0..batch {
            self.ask_one(out);
        }
        batch
    }

    fn ask_last(&mut self, out: &mut Vec<u8>) -> usize {
        self.increment(out);
        if self.read {
            return 1;
        }
        self.get(out);
        2
    }

    fn judge(&mut self, input: &[u8]) -> Judged {
        match frame(input) {
            Ok(None) => Judged::Incomplete,
            Ok(Some(length)) => self.owed.judge(&input[..length], &mut self.counter),
            Err(Malformed) => self.owed.out_of_step(input),
        }
    }
}

/// The length of the reply at the front.
fn frame(input: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(&kind) = input.first() else {
        return Ok(None);
    };
    if !matches!(kind, b'+' | b'-' | b':' | b'$') {
        return Err(Malformed);
    }
    let Some(head) = line(input)? else {
        return Ok(None);
    };
    if kind != b'$' || &input[1..head] == b"-1\r\n" {
        return Ok(Some(head));
    }
    let digits = std::str::from_utf8(&input[1..head - 2]).map_err(|_| Malformed)?;
    let length: usize = digits.parse().map_err(|_| Malformed)?;
    if length > VALUE_BYTES_MAX {
        return Err(Malformed);
    }
    let end = head + length + 2;
    match input.get(end - 2..end) {
        None => Ok(None),
        Some(b"\r\n") => Ok(Some(end)),
        Some(_) => Err(Malformed),
    }
}

fn command(words: &[&[u8]], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(&bulk(word));
    }
}

fn bulk(value: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", value.len()).as_bytes(), value, b"\r\n"].concat()
}

/// As [`keys`](super::keys) are kept.
pub(super) const STORE: Store = Store {
    set: |name, value, out| command(&[b"SET", name.as_bytes(), value], out),
    stored: b"+OK\r\n",
    get: |name, out| command(&[b"GET", name.as_bytes()], out),
    entry: |_, value| bulk(value),
    missing: b"$-1\r\n",
    frame,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_cut_where_they_end() {
        assert_eq!(frame(b":12\r\n+OK\r\n"), Ok(Some(5)));
        assert_eq!(frame(b"$3\r\nabc\r\n"), Ok(Some(9)));
        assert_eq!(frame(b"$-1\r\n"), Ok(Some(5)));
        assert_eq!(frame(b"$3\r\nabc\r"), Ok(None));
        assert_eq!(frame(b"$3\r\nabcd\r\n"), Err(Malformed));
        assert_eq!(frame(b"x"), Err(Malformed));
        assert_eq!(frame(b"$9999999\r\n"), Err(Malformed));
    }

    #[test]
    fn a_state_gone_back_shows_as_lost_updates() {
        let mut redis = Redis::new(1, 1);
        redis.counter = 40;
        redis.owed.push(Expected::Counter(41));
        match redis.judge(b":38\r\n") {
            Judged::Reply {
                finding: Some(finding),
                ..
            } => assert_eq!(finding.lost, 3),
            other => panic!("{other:?}"),
        }
    }
}
