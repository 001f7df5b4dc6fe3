//! The destination's side.

use super::{Machine, Row, named, table};
use crate::phase::Phase;

named! {
    /// What the destination does.
    Step {
        /// Hears what the source wants: examines, or answers its question.
        Listen = "listen",
        /// Closes the gate, stages the address silently, warms CRIU.
        Prepare = "prepare",
        /// Takes in pages and images.
        Receive = "receive",
        /// Builds the copy and holds it before its first instruction.
        Restore = "restore",
        /// Waits for `Go`.
        AwaitGo = "await_go",
        /// Puts `Owned` on record, unless a question has closed the record.
        Own = "own",
        /// Tells the source, opens egress, announces the address.
        Open = "open",
        /// Notes that CRIU is about to be told to let the copy go: without
        /// this note a copy has never run.
        Note = "note",
        /// Lets the copy go, puts held packets in, opens ingress.
        Resume = "resume",
        /// Puts `Done` on record and clears up.
        Close = "close",
        /// Undoes everything, newest first.
        Undo = "undo",
        /// Finds out whether the copy can have run, and acts on it.
        Abandon = "abandon",
        /// The source only wanted to check, or to know the verdict.
        Answered = "answered",
        /// The tree runs here.
        Running = "running",
        /// Nothing of the tree is here.
        Undone = "undone",
        /// It failed after the commit; the record says what that means.
        Abandoned = "abandoned",
    }
}

named! {
    /// What came of it.
    Event {
        /// It is done.
        Done = "done",
        /// The source wanted no more than an answer.
        Asked = "asked",
        /// It failed, took too long, or the source is gone.
        Failed = "failed",
    }
}

impl Machine for Step {
    type Event = Event;

    const ALL: &'static [Self] = Self::EVERY;
    const EVENTS: &'static [Event] = Event::EVERY;
    const TABLE: &'static [Row<Self, Event>] = table! { Step, Event;
        Listen + Done => Prepare;
        Listen + Asked => Answered;
        Listen + Failed => Undo;
        Prepare + Done => Receive;
        Prepare + Failed => Undo;
        Receive + Done => Restore;
        Receive + Failed => Undo;
        Restore + Done => AwaitGo;
        Restore + Failed => Undo;
        AwaitGo + Done => Own;
        AwaitGo + Failed => Undo;
        Own + Done => Open;
        Own + Failed => Undo;
        // The commit: nothing below leads to `Undo`.
        Open + Done => Note;
        Open + Failed => Abandon;
        Note + Done => Resume;
        Note + Failed => Abandon;
        Resume + Done => Close;
        Resume + Failed => Abandon;
        Close + Done => Running;
        Close + Failed => Abandon;
        Undo + Done => Undone;
        Abandon + Done => Abandoned;
    };

    fn name(self) -> &'static str {
        self.text()
    }

    fn event_name(event: Event) -> &'static str {
        event.text()
    }
}

impl Step {
    /// Whether nothing of this step binds anybody yet, so that it may be given
    /// up in the middle.
    #[must_use]
    pub fn may_be_dropped(self) -> bool {
        self < Self::Own
    }

    /// The phase, for the message about a failure.
    #[must_use]
    pub fn phase(self) -> Phase {
        match self {
            Self::Listen | Self::Answered => Phase::Preflight,
            Self::Prepare => Phase::Prepare,
            Self::Receive => Phase::Dump,
            Self::Restore => Phase::Restore,
            Self::AwaitGo | Self::Own => Phase::HandedOver,
            Self::Open | Self::Note | Self::Resume | Self::Abandon | Self::Abandoned => {
                Phase::Takeover
            }
            Self::Close => Phase::Finish,
            Self::Running => Phase::Committed,
            Self::Undo | Self::Undone => Phase::RolledBack,
        }
    }
}
