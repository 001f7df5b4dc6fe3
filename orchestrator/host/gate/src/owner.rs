//! Who answers for a gate.

use std::fs;

/// A process, told apart from a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) pid: u32,
    /// Field 22 of `/proc/PID/stat`; 0 where it could not be read.
    pub(crate) start_ticks: u64,
}

impl Owner {
    pub(crate) fn this_process() -> Self {
        let pid = std::process::id();
        Self {
            pid,
            start_ticks: stat(pid).map_or(0, |stat| stat.start_ticks),
        }
    }

    pub(crate) fn is_alive(self) -> bool {
        stat(self.pid).is_some_and(|stat| {
            !stat.is_dead && (self.start_ticks == 0 || stat.start_ticks == self.start_ticks)
        })
    }
}

struct Stat {
    /// A zombie or a task about to vanish.
    is_dead: bool,
    start_ticks: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse(stat: &str) -> Option<Stat> {
    // The name in parentheses may hold anything, also spaces and parentheses;
    // the last one closes it. Field 3, the state, follows.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let is_dead = matches!(fields.next()?, "Z" | "X" | "x");
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat {
        is_dead,
        start_ticks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_successor_is_not_it() {
        let me = Owner::this_process();
        assert!(me.start_ticks > 0);
        assert!(me.is_alive());
        let other = Owner {
            start_ticks: me.start_ticks + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_name_with_parentheses_is_read() {
        let line = "7 (a) Z (b) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let stat = parse(line).unwrap();
        assert!(!stat.is_dead);
        assert_eq!(stat.start_ticks, 4242);
    }
}
