//! What each step does to the hosts, one effect at a time, in the order of
//! `orchestrator/session`.

use migrate_core::protocol::{destination, source};

/// One effect of the source, or of a process that recovers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SourceOp {
    Connect,
    AwaitFindings,
    BeginRecord,
    AttachGate,
    SendPrepare,
    AwaitPrepared,
    CloseGate,
    Seize,
    SendDumped,
    AwaitRestored,
    CloseFence,
    CriuLives,
    GateForGood,
    WriteHandedOver,
    Withdraw,
    SendGo,
    AwaitOwned,
    CloseLink,
    Ask,
    AwaitVerdict,
    AwaitRunning,
    KillTree,
    /// Sends what the copy lacks, and waits for the word that it has everything.
    Deliver,
    WriteUndone,
    PutAddressBack,
    OpenFence,
    Thaw,
    DetachGate,
    Discard,
    /// Recovery: waits for a CRIU whose owner is dead.
    AwaitCriu,
    /// Recovery: reads the record and decides.
    Decide,
    /// Recovery: decides by the answer.
    Told,
    /// The driver's, too, where pages are still to go over.
    WriteDone,
}

use SourceOp as S;

/// What a step of the source is made of.
pub(crate) fn of_source(step: source::Step) -> &'static [SourceOp] {
    use source::Step;
    match step {
        Step::Preflight => &[S::Connect, S::AwaitFindings],
        Step::Track => &[S::BeginRecord, S::AttachGate],
        Step::Prepare => &[S::SendPrepare, S::AwaitPrepared],
        Step::Freeze => &[S::CloseGate, S::Seize],
        Step::Dump => &[S::SendDumped],
        Step::Restore => &[S::AwaitRestored],
        Step::Fence => &[S::CloseFence],
        Step::Prove => &[S::CriuLives, S::GateForGood],
        Step::Record => &[S::WriteHandedOver],
        Step::Withdraw => &[S::Withdraw],
        Step::Go => &[S::SendGo, S::AwaitOwned],
        Step::AskOwner | Step::AskRunner => &[S::CloseLink, S::Ask, S::AwaitVerdict],
        Step::Await => &[S::AwaitRunning],
        Step::Deliver => &[S::WriteDone, S::Deliver],
        Step::Remove | Step::RemoveLost => &[S::KillTree, S::CloseLink, S::DetachGate, S::Discard],
        Step::TakeBack => &[
            S::WriteUndone,
            S::CloseLink,
            S::PutAddressBack,
            S::OpenFence,
            S::Thaw,
            S::DetachGate,
            S::Discard,
        ],
        Step::Precopy | Step::Committed | Step::RolledBack | Step::Undecided | Step::Lost => &[],
    }
}

/// What recovery begins with.
pub(crate) const DECIDE_SOURCE: &[SourceOp] = &[S::Decide];

/// Recovery's question.
pub(crate) const ASK: &[SourceOp] = &[S::Ask, S::Told];

/// `back_here`, after a question or not.
pub(crate) const BACK_HERE: &[SourceOp] = &[
    S::WriteUndone,
    S::AwaitCriu,
    S::PutAddressBack,
    S::OpenFence,
    S::DetachGate,
    S::Discard,
];

/// `remove_tree`.
pub(crate) const REMOVE_TREE: &[SourceOp] = &[
    S::WriteDone,
    S::CloseFence,
    S::AwaitCriu,
    S::KillTree,
    S::Withdraw,
    S::DetachGate,
    S::Discard,
];

/// One effect of the destination, or of a process that recovers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DestinationOp {
    Findings,
    AwaitPrepare,
    BeginRecord,
    CloseGate,
    Stage,
    SendPrepared,
    AwaitDumped,
    Build,
    SendRestored,
    AwaitGo,
    CriuLives,
    WriteOwned,
    SendOwned,
    Announce,
    NoteLetGo,
    LetGo,
    OpenGate,
    Run,
    SendRunning,
    WriteDone,
    DetachGate,
    WriteUndone,
    KillCopy,
    Unstage,
    Discard,
    /// The record has no owner any more: recovery begins.
    GiveUp,
    /// Recovery: reads the record and decides.
    Decide,
    /// Recovery: what has been proved stays proved when the copy is gone.
    Unnote,
    /// Recovery: waits for a CRIU whose owner is dead.
    AwaitCriu,
    /// Recovery: decides by what is left of the copy.
    Examine,
}

use DestinationOp as D;

/// What a step of the destination is made of.
pub(crate) fn of_destination(step: destination::Step) -> &'static [DestinationOp] {
    use destination::Step;
    match step {
        Step::Listen => &[D::Findings, D::AwaitPrepare],
        Step::Prepare => &[D::BeginRecord, D::CloseGate, D::Stage, D::SendPrepared],
        Step::Receive => &[D::AwaitDumped],
        Step::Restore => &[D::Build, D::SendRestored],
        Step::AwaitGo => &[D::AwaitGo],
        Step::Own => &[D::CriuLives, D::WriteOwned],
        Step::Open => &[D::SendOwned, D::Announce],
        Step::Note => &[D::CriuLives, D::NoteLetGo],
        Step::Resume => &[D::LetGo, D::OpenGate, D::Run, D::SendRunning],
        Step::Close => &[D::WriteDone, D::DetachGate],
        Step::Undo => &[
            D::WriteUndone,
            D::KillCopy,
            D::Unstage,
            D::DetachGate,
            D::Discard,
        ],
        Step::Abandon => &[D::GiveUp],
        Step::Answered | Step::Running | Step::Undone | Step::Abandoned => &[],
    }
}

/// What recovery begins with.
pub(crate) const DECIDE_DESTINATION: &[DestinationOp] = &[D::Decide];

/// `owned`: is there a copy, and has it run?
pub(crate) const EXAMINE: &[DestinationOp] = &[D::AwaitCriu, D::Examine];

/// `remove_copy`.
pub(crate) const REMOVE_COPY: &[DestinationOp] = &[
    D::WriteUndone,
    D::AwaitCriu,
    D::KillCopy,
    D::Unstage,
    D::DetachGate,
    D::Discard,
];

/// The same of a record that says `Owned`, which says so until the address,
/// which may have been announced, has gone.
pub(crate) const GIVE_BACK: &[DestinationOp] = &[
    D::Unnote,
    D::KillCopy,
    D::Unstage,
    D::DetachGate,
    D::WriteUndone,
    D::Discard,
];

/// The copy runs.
pub(crate) const OPEN_HERE: &[DestinationOp] = &[D::WriteDone, D::DetachGate, D::Announce];
