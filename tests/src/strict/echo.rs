//! The numbered echo.

use std::collections::VecDeque;

use super::dialogue::{Dialogue, Dice, Excerpt, Finding, Judged};
use crate::echo_wire::{
    Kind, Malformed, REPLY_HEADER_BYTES, Reply, Request, Stat, payload, payload_length, scramble,
};

pub(super) struct Echo {
    connection: u64,
    /// Number of the last request sent.
    sent: u64,
    /// Requests without a reply.
    owed: VecDeque<(Kind, u64)>,
    /// The server's count of replies, contiguous.
    replies: u64,
    /// What the server had complained about by its last reply.
    complaints: (u32, u32, u32),
    /// Whether the server's whole count is asked at the end.
    asks_stat: bool,
    dice: Dice,
}

impl Echo {
    pub(super) fn new(run: u64, connection: usize) -> Self {
        let id = scramble(run, connection as u64);
        Self {
            connection: id,
            sent: 0,
            owed: VecDeque::new(),
            replies: 0,
            complaints: (0, 0, 0),
            asks_stat: connection == 0,
            dice: Dice::new(id),
        }
    }

    fn send(&mut self, kind: Kind, out: &mut Vec<u8>) {
        self.sent += 1;
        Request::write(kind, self.connection, self.sent, out);
        self.owed.push_back((kind, self.sent));
    }

    fn check(&mut self, reply: &Reply, received: &[u8]) -> (usize, Option<Finding>) {
        let number = reply.number;
        if number < self.owed.front().map_or(u64::MAX, |(_, wanted)| *wanted) {
            // What the server says of a repeated message is the same finding.
            self.replies = self.replies.max(reply.replies);
            self.complaints = (reply.lost, reply.doubled, reply.wrong);
        }
        let Some(&(kind, wanted)) = self.owed.front() else {
            let text = format!("a reply to no request: number {number}");
            return (0, Some(Finding::doubled(1, text)));
        };
        if reply.connection != self.connection || number > self.sent {
            let text =
                format!("expected number {wanted}, got number {number} of another connection");
            return (1, Some(Finding::wrong(text)));
        }
        if number < wanted {
            let text = format!("a reply came again: expected number {wanted}, got {number}");
            return (0, Some(Finding::doubled(1, text)));
        }
        if number > wanted {
            let skipped = number - wanted;
            let text = format!("replies missing: expected number {wanted}, got {number}");
            self.replies = reply.replies;
            let answered = usize::try_from(skipped).unwrap_or(0) + 1;
            return (answered, Some(Finding::lost(skipped, text)));
        }
        let counted = std::mem::replace(&mut self.replies, reply.replies) + 1;
        if reply.replies != counted {
            let text = format!(
                "the server's counter should be {counted}, is {}",
                reply.replies
            );
            let finding = if reply.replies < counted {
                Finding::lost(counted - reply.replies, text)
            } else {
                Finding::doubled(reply.replies - counted, text)
            };
            return (1, Some(finding));
        }
        (
            1,
            self.complaint(reply)
                .or_else(|| self.check_payload(kind, reply, received)),
        )
    }

    /// What the server found wrong since its last reply.
    fn complaint(&mut self, reply: &Reply) -> Option<Finding> {
        let now = (reply.lost, reply.doubled, reply.wrong);
        let before = std::mem::replace(&mut self.complaints, now);
        (before != now).then(|| {
            let [lost, doubled, wrong] = [
                now.0 - before.0.min(now.0),
                now.1 - before.1.min(now.1),
                now.2 - before.2.min(now.2),
            ];
            Finding {
                lost: lost.into(),
                doubled: doubled.into(),
                text: format!("the server missed {lost}, saw {doubled} again, {wrong} wrong"),
            }
        })
    }

    fn check_payload(&self, kind: Kind, reply: &Reply, received: &[u8]) -> Option<Finding> {
        if reply.kind != kind {
            return Some(Finding::wrong(format!(
                "number {} changed its kind",
                reply.number
            )));
        }
        match kind {
            Kind::Echo => {
                let mut due = Vec::new();
                let length = payload_length(self.connection, reply.number);
                payload(self.connection, reply.number, length, &mut due);
                (due != received).then(|| {
                    let (due, got) = (Excerpt(&due), Excerpt(received));
                    Finding::wrong(format!(
                        "number {}: expected {due}, got {got}",
                        reply.number
                    ))
                })
            }
            Kind::Stat => match serde_json::from_slice::<Stat>(received) {
                Ok(stat) if stat.lost + stat.doubled + stat.wrong == 0 => None,
                // Its lost and doubled are counted already, by their connections.
                Ok(stat) => Some(Finding::wrong(format!(
                    "the server counted in all: {stat:?}"
                ))),
                Err(error) => Some(Finding::wrong(format!("no counters: {error}"))),
            },
        }
    }
}

impl Dialogue for Echo {
    fn ask(&mut self, out: &mut Vec<u8>) -> usize {
        let batch = self.dice.batch();
        for _ in 0..batch {
            self.send(Kind::Echo, out);
        }
        batch
    }

    fn ask_last(&mut self, out: &mut Vec<u8>) -> usize {
        if self.asks_stat {
            self.send(Kind::Stat, out);
        }
        usize::from(self.asks_stat)
    }

    fn judge(&mut self, input: &[u8]) -> Judged {
        let Some((header, rest)) = input.split_first_chunk::<REPLY_HEADER_BYTES>() else {
            return Judged::Incomplete;
        };
        match Reply::read(header) {
            Err(Malformed) => {
                let wanted = self
                    .owed
                    .front()
                    .map_or(self.sent + 1, |(_, number)| *number);
                let got = Excerpt(input);
                let text = format!("the stream is out of step before number {wanted}: {got}");
                Judged::OutOfStep(Finding::wrong(text))
            }
            Ok(reply) => match rest.get(..reply.payload_bytes) {
                None => Judged::Incomplete,
                Some(received) => {
                    let (answered, finding) = self.check(&reply, received);
                    for _ in 0..answered {
                        self.owed.pop_front();
                    }
                    let used = REPLY_HEADER_BYTES + reply.payload_bytes;
                    Judged::Reply {
                        used,
                        answered,
                        finding,
                    }
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(echo: &Echo, number: u64, replies: u64) -> Vec<u8> {
        let (mut body, mut out) = (Vec::new(), Vec::new());
        payload(
            echo.connection,
            number,
            payload_length(echo.connection, number),
            &mut body,
        );
        Reply {
            kind: Kind::Echo,
            connection: echo.connection,
            number,
            replies,
            lost: 0,
            doubled: 0,
            wrong: 0,
            payload_bytes: 0,
        }
        .write(&body, &mut out);
        out
    }

    fn verdict(judged: Judged) -> Option<(u64, u64)> {
        match judged {
            Judged::Reply { finding, .. } => finding.map(|f| (f.lost, f.doubled)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_server_whose_state_went_back_is_found() {
        let mut echo = Echo::new(1, 0);
        let mut sink = Vec::new();
        (0..3).for_each(|_| echo.send(Kind::Echo, &mut sink));
        assert_eq!(verdict(echo.judge(&answer(&echo, 1, 1))), None);
        assert_eq!(verdict(echo.judge(&answer(&echo, 2, 1))), Some((1, 0)));
        assert_eq!(verdict(echo.judge(&answer(&echo, 3, 3))), Some((0, 1)));
    }

    #[test]
    fn a_repeated_and_a_skipped_reply_are_found() {
        let mut echo = Echo::new(1, 0);
        let mut sink = Vec::new();
        (0..4).for_each(|_| echo.send(Kind::Echo, &mut sink));
        assert_eq!(verdict(echo.judge(&answer(&echo, 1, 1))), None);
        assert_eq!(verdict(echo.judge(&answer(&echo, 1, 1))), Some((0, 1)));
        assert_eq!(verdict(echo.judge(&answer(&echo, 4, 4))), Some((2, 0)));
    }
}
