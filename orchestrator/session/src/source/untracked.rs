//! Processes whose memory no round can follow, and who is told.

use std::collections::HashSet;

use migrate_memory::{Precopy, TrackingState};

use super::soft_dirty::SoftDirty;
use crate::error::chain;
use crate::progress::Reporter;

/// Told one by one; the others are only counted.
const TOLD_MAX: usize = 16;

/// A process, and why it is not tracked.
type Refusal = (i32, String);

/// What has been told of processes that are not tracked, each once. One that lives for
/// moments, such as the child of `vfork`, is no news: it takes two rounds, or the last.
#[derive(Debug, Default)]
pub(super) struct Untracked {
    before: HashSet<Refusal>,
    told: HashSet<Refusal>,
}

impl Untracked {
    /// Takes in what a round has found; what there is to tell, by PID.
    fn after_round(&mut self, now: HashSet<Refusal>, is_last: bool) -> Vec<Refusal> {
        let lasting = now
            .iter()
            .filter(|refusal| is_last || self.before.contains(*refusal));
        let mut news: Vec<Refusal> = lasting
            .filter(|refusal| self.told.insert((*refusal).clone()))
            .cloned()
            .collect();
        self.before = now;
        news.sort();
        news
    }

    /// Warns of those that a round could not follow.
    pub(super) fn warn(
        &mut self,
        precopy: Option<&Precopy>,
        soft_dirty: Option<&SoftDirty>,
        is_last: bool,
        reporter: &Reporter,
    ) {
        let tracked = precopy.into_iter().flat_map(Precopy::processes);
        let untracked = tracked.filter_map(|process| match process.state {
            TrackingState::Untracked { reason } => Some((process.pid, reason)),
            TrackingState::Tracked { .. } => None,
        });
        let marked = soft_dirty.into_iter().flat_map(SoftDirty::refused);
        let now = untracked
            .chain(marked)
            .map(|(pid, reason)| (pid, chain(reason)))
            .collect();
        let told = self.told.len();
        let news = self.after_round(now, is_last);
        let more = news.len().saturating_sub(TOLD_MAX.saturating_sub(told));
        for (pid, reason) in &news[..news.len() - more] {
            // One that has ended since has no name any more.
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            reporter.warn(format!(
                "changes to the memory of process {pid} ({}) cannot be followed: {reason}; its \
                 memory goes whole at the freeze",
                name.trim_end()
            ));
        }
        if more > 0 {
            reporter.warn(format!(
                "the same holds for {more} more: their memory goes whole at the freeze"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_once() {
        let set = |refusals: &[(i32, &str)]| -> HashSet<Refusal> {
            let owned = refusals.iter().map(|&(pid, why)| (pid, why.to_owned()));
            owned.collect()
        };
        let mut untracked = Untracked::default();
        let mut told = |now: &[(i32, &str)], is_last| untracked.after_round(set(now), is_last);
        let (direct, traced, child) = ((1, "direct"), (1, "traced"), (2, "shares"));
        let owned = |(pid, why): (i32, &str)| (pid, why.to_owned());
        assert_eq!(told(&[direct, child], false), []);
        assert_eq!(told(&[direct], false), [owned(direct)]);
        assert_eq!(told(&[direct, child], false), []);
        assert_eq!(told(&[direct, traced], false), []);
        assert_eq!(
            told(&[direct, traced, (3, "x")], true),
            [owned(traced), (3, "x".to_owned())]
        );
    }
}
