//! Messages of the other side, read by a task of their own, so that waiting
//! for one can be given up at any moment without tearing a frame apart.

use std::time::Duration;

use migrate_channel::{ChannelError, Receiver};
use migrate_core::wire::Message;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::Error;

/// The receiving half of a connection once only messages come.
#[derive(Debug)]
pub(crate) struct Inbox {
    peer: String,
    messages: mpsc::Receiver<Result<Message, ChannelError>>,
    task: JoinHandle<()>,
}

impl Inbox {
    /// Messages that may wait to be read; a peer that sends more is stopped by
    /// the connection's own flow control.
    const BACKLOG: usize = 16;

    /// Silence that no step of a migration is allowed to make. Every wait has
    /// a shorter limit of its own; this one ends the task.
    const SILENCE: Duration = Duration::from_secs(24 * 3600);

    pub(crate) fn new(peer: String, mut receiver: Receiver) -> Self {
        let (sender, messages) = mpsc::channel(Self::BACKLOG);
        let task = tokio::spawn(async move {
            loop {
                let message = receiver.control(Self::SILENCE).await;
                let last = message.is_err();
                if sender.send(message).await.is_err() || last {
                    return;
                }
            }
        });
        Self {
            peer,
            messages,
            task,
        }
    }

    /// The next message; a [`Message::Failed`] or [`Message::Abort`] becomes an error.
    pub(crate) async fn next(&mut self, awaited: &'static str) -> Result<Message, Error> {
        let gone = || Error::PeerGone {
            peer: self.peer.clone(),
            awaited,
        };
        match self.messages.recv().await {
            Some(Ok(Message::Failed(error))) => Err(error.into()),
            Some(Ok(Message::Abort { reason })) => Err(Error::Aborted(reason)),
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) if error.is_disconnect() => Err(gone()),
            Some(Err(source)) => Err(Error::Channel {
                peer: self.peer.clone(),
                source,
            }),
            None => Err(gone()),
        }
    }

    /// As [`Inbox::next`], within a limit.
    pub(crate) async fn next_within(
        &mut self,
        awaited: &'static str,
        limit: Duration,
    ) -> Result<Message, Error> {
        match tokio::time::timeout(limit, self.next(awaited)).await {
            Ok(message) => message,
            Err(_) => Err(Error::PeerSilent {
                peer: self.peer.clone(),
                awaited,
                waited: limit,
            }),
        }
    }

    /// Waits until the other side has closed, within a limit.
    pub(crate) async fn closed(&mut self, limit: Duration) {
        let _ = tokio::time::timeout(limit, async {
            while let Some(Ok(_)) = self.messages.recv().await {}
        })
        .await;
    }

    /// See [`unexpected`].
    pub(crate) fn unexpected(&self, message: &Message, awaited: &'static str) -> Error {
        unexpected(&self.peer, message, awaited)
    }
}

/// The error for a message that has no meaning at this point.
pub(crate) fn unexpected(peer: &str, message: &Message, awaited: &'static str) -> Error {
    let text = format!("{message:?}");
    let got = text
        .split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or("something")
        .to_owned();
    Error::Unexpected {
        peer: peer.to_owned(),
        got,
        awaited,
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.task.abort();
    }
}
