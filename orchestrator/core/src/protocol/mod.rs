//! Who does what next: the protocol of both sides as data.
//!
//! Each side is in one *step*, does the one thing that this step stands for,
//! and reports what came of it as an *event*; a table says which step follows.
//! The tables know no socket, file or clock, so the driver and the simulator
//! (`tests/simulator`) run the same ones. What a crash leaves is decided by the
//! pure functions in [`recovery`].
//!
//! The order of the source's steps from [`source::Step::Fence`] on is the
//! safety argument of the whole tool; see `docs/ARCHITECTURE.md`.

use std::collections::BTreeSet;
use std::fmt::{Debug, Write as _};

use thiserror::Error;

pub mod destination;
pub mod recovery;
pub mod source;

/// One arrow: in this step, after this event, that step follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<S, E> {
    /// The step.
    pub from: S,
    /// What came of it.
    pub on: E,
    /// The step that follows.
    pub to: S,
}

/// An event that a step has no answer to: a defect of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{on} cannot happen in step {from}")]
pub struct IllegalTransition {
    /// The step it happened in.
    pub from: &'static str,
    /// The event.
    pub on: &'static str,
}

/// A side of the protocol.
pub trait Machine: Copy + Eq + Ord + Debug + 'static {
    /// What can come of a step.
    type Event: Copy + Eq + Debug + 'static;

    /// Every step, in order.
    const ALL: &'static [Self];
    /// Every event.
    const EVENTS: &'static [Self::Event];
    /// Every arrow.
    const TABLE: &'static [Row<Self, Self::Event>];

    /// The name of a step, as diagrams show it.
    fn name(self) -> &'static str;
    /// The name of an event.
    fn event_name(event: Self::Event) -> &'static str;

    /// The step that follows.
    ///
    /// # Errors
    ///
    /// The event has no meaning in this step.
    fn on(self, event: Self::Event) -> Result<Self, IllegalTransition> {
        follow(Self::TABLE, self, event)
    }

    /// Whether this is an end.
    #[must_use]
    fn is_end(self) -> bool {
        Self::TABLE.iter().all(|row| row.from != self)
    }
}

/// [`Machine::on`] with another table: how the simulator is shown to notice
/// a wrong one.
///
/// # Errors
///
/// The table has no such arrow.
pub fn follow<S: Machine>(
    table: &[Row<S, S::Event>],
    from: S,
    on: S::Event,
) -> Result<S, IllegalTransition> {
    table
        .iter()
        .find(|row| row.from == from && row.on == on)
        .map(|row| row.to)
        .ok_or(IllegalTransition {
            from: from.name(),
            on: S::event_name(on),
        })
}

/// A side as a Mermaid state diagram.
#[must_use]
pub fn draw<S: Machine>() -> String {
    let mut out = String::from("stateDiagram-v2\n");
    if let Some(first) = S::ALL.first() {
        let _ = writeln!(out, "    [*] --> {}", first.name());
    }
    for row in S::TABLE {
        let (from, to) = (row.from.name(), row.to.name());
        let _ = writeln!(out, "    {from} --> {to}: {}", S::event_name(row.on));
    }
    for step in S::ALL.iter().filter(|step| step.is_end()) {
        let _ = writeln!(out, "    {} --> [*]", step.name());
    }
    out
}

/// Every pair of step and event, one a line; `-` where the pair cannot be.
#[must_use]
pub fn list<S: Machine>() -> String {
    let mut out = String::new();
    for step in S::ALL {
        for event in S::EVENTS {
            let next = step.on(*event).map_or("-", Machine::name);
            let (step, event) = (step.name(), S::event_name(*event));
            let _ = writeln!(out, "{step} + {event} -> {next}");
        }
    }
    out
}

/// The steps from which this one can still be reached, itself among them.
#[must_use]
pub fn before<S: Machine>(step: S) -> BTreeSet<S> {
    let mut found = BTreeSet::from([step]);
    loop {
        let known = found.len();
        for row in S::TABLE {
            if found.contains(&row.to) {
                found.insert(row.from);
            }
        }
        if found.len() == known {
            return found;
        }
    }
}

/// Declares the steps or events of a side with their names.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $($(#[$doc])* $variant,)+
        }

        impl $name {
            const EVERY: &'static [Self] = &[$(Self::$variant),+];

            const fn text(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    };
}

/// Declares a table: `From + Event => To;` each.
macro_rules! table {
    ($step:ident, $event:ident; $($from:ident + $on:ident => $to:ident;)+) => {
        &[$(crate::protocol::Row {
            from: $step::$from,
            on: $event::$on,
            to: $step::$to,
        }),+]
    };
}

pub(crate) use {named, table};

#[cfg(test)]
mod tests;
