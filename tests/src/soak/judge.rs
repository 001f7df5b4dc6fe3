//! Whether a figure grows.

/// How a figure may behave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Comes back to what it was, to the last one.
    Constant,
    /// Grows by no more than this from the first part of the run to the last.
    Slack(u64),
    /// Is never more than this.
    AtMost(u64),
}

/// What became of one figure in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Course {
    /// In the first part.
    pub at_first: u64,
    /// In the last part.
    pub at_last: u64,
    /// At any time.
    pub most: u64,
    /// Whether it has broken its rule.
    pub grows: bool,
}

impl Rule {
    /// Judges the values of the first and of the last part of a run, and the
    /// most of all. `None` without values.
    ///
    /// What is left behind stays: a value that was higher for a moment comes
    /// down again, so the least of each part is what counts.
    #[must_use]
    pub fn judge(self, first: &[u64], last: &[u64], all: &[u64]) -> Option<Course> {
        let least = |part: &[u64]| part.iter().copied().min();
        let most = all.iter().copied().max()?;
        let (at_first, at_last) = (least(first)?, least(last)?);
        let grows = match self {
            Self::Constant => at_last > at_first,
            Self::Slack(slack) => at_last > at_first.saturating_add(slack),
            Self::AtMost(bound) => most > bound,
        };
        Some(Course {
            at_first,
            at_last,
            most,
            grows,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grows(rule: Rule, values: &[u64]) -> bool {
        let part = values.len() / 3;
        let (first, last) = (&values[..part], &values[values.len() - part..]);
        rule.judge(first, last, values).unwrap().grows
    }

    #[test]
    fn what_is_left_behind_is_growth_however_little() {
        assert!(grows(Rule::Constant, &[3, 3, 3, 4, 4, 4]));
        assert!(grows(Rule::Constant, &[0, 1, 2, 3, 4, 5]));
        assert!(!grows(Rule::Constant, &[3, 3, 3, 3, 3, 3]));
    }

    #[test]
    fn what_comes_and_goes_is_none() {
        assert!(!grows(Rule::Constant, &[3, 3, 9, 9, 7, 3]));
        assert!(!grows(Rule::Constant, &[5, 5, 4, 4, 3, 3]));
        // A high value at the beginning hides nothing.
        assert!(grows(Rule::Constant, &[9, 3, 3, 3, 4, 5]));
    }

    #[test]
    fn memory_has_slack_and_no_more() {
        let steady = [100, 130, 90, 100, 120, 110];
        assert!(!grows(Rule::Slack(30), &steady));
        let rising = [100, 110, 120, 130, 140, 150];
        assert!(grows(Rule::Slack(30), &rising));
    }

    #[test]
    fn a_bound_holds_all_the_time() {
        assert!(!grows(Rule::AtMost(6), &[1, 2, 3, 4, 5, 6]));
        assert!(grows(Rule::AtMost(6), &[1, 2, 7, 2, 1, 1]));
    }

    #[test]
    fn nothing_is_judged_by_nothing() {
        assert_eq!(Rule::Constant.judge(&[], &[1], &[1]), None);
    }
}
