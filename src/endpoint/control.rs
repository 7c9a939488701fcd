//! The endpoint's side of the agent's socket. One agent at a time: a newer one takes the older one's place, because an
//! agent that hangs must not keep its successor out.

use std::time::Duration;

use tokio::time::timeout;
use tracing::{info, warn};

use super::words::{Line, Listener, Settings, ToAgent, ToEndpoint, VERSION};
use crate::core::endpoint::Report;
use crate::core::route::Routing;
use crate::guardian::page::Page;

/// An agent that does not read is not waited for.
const SAY: Duration = Duration::from_millis(100);

pub enum Heard {
    Settings(Box<Settings>),
    Routing(Box<Routing>),
    Page(Page),
    /// An agent came or went.
    Agent,
    End,
}

pub struct Control {
    listener: Listener,
    agent: Option<Line>,
    sessions: u64,
    last: Option<Report>,
}

impl Control {
    pub fn new(listener: Listener) -> Control {
        Control { listener, agent: None, sessions: 0, last: None }
    }

    /// The next thing that matters. Cancel-safe but for the greeting of a new agent, which it then repeats by coming again.
    pub async fn hear(&mut self) -> Heard {
        let Some(agent) = &self.agent else {
            return self.greet().await;
        };
        tokio::select! {
            accepted = self.listener.accept() => {
                info!("another agent comes");
                self.welcome(accepted).await
            }
            heard = agent.hear::<ToEndpoint>() => match heard {
                Ok(Some((word, descriptor))) => self.understand(word, descriptor),
                Ok(None) => self.agent_left("it closed"),
                Err(error) => self.agent_left(&error.to_string()),
            }
        }
    }

    async fn greet(&mut self) -> Heard {
        let accepted = self.listener.accept().await;
        self.welcome(accepted).await
    }

    async fn welcome(&mut self, accepted: std::io::Result<Line>) -> Heard {
        let line = match accepted {
            Ok(line) => line,
            Err(error) => {
                warn!(%error, "accept an agent");
                return Heard::Agent;
            }
        };
        let hello = ToAgent::Hello {
            words: VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            sessions: self.sessions,
        };
        // A stranger that only looked has gone again.
        if matches!(timeout(SAY, line.say(&hello, None)).await, Ok(Ok(()))) {
            self.agent = Some(line);
            self.last = None;
        }
        Heard::Agent
    }

    fn understand(&mut self, word: ToEndpoint, descriptor: Option<std::os::fd::OwnedFd>) -> Heard {
        match word {
            ToEndpoint::Hello { words: VERSION, version } => {
                info!(version, "an agent has come");
                Heard::Agent
            }
            ToEndpoint::Hello { words, version } => {
                self.agent_left(&format!("it is {version} and speaks version {words}, this endpoint {VERSION}"))
            }
            ToEndpoint::Settings(settings) => Heard::Settings(settings),
            ToEndpoint::Routing(routing) => Heard::Routing(routing),
            ToEndpoint::Page { nonce } => match descriptor.map(|file| Page::open(&file, nonce)) {
                Some(Ok(page)) => Heard::Page(page),
                Some(Err(error)) => {
                    warn!(%error, "the agent's deadline page cannot be used");
                    Heard::Agent
                }
                None => Heard::Agent,
            },
            ToEndpoint::End => Heard::End,
        }
    }

    /// Clients stay: the last route and the page count for as long as they say.
    fn agent_left(&mut self, why: &str) -> Heard {
        info!(why, "the agent has gone");
        self.agent = None;
        Heard::Agent
    }

    /// Tells the agent what is new.
    pub async fn report(&mut self, report: Report) {
        self.sessions = report.sessions;
        if self.last.as_ref() == Some(&report) {
            return;
        }
        if let Some(agent) = &self.agent
            && matches!(timeout(SAY, agent.say(&ToAgent::Report(Box::new(report.clone())), None)).await, Ok(Ok(())))
        {
            self.last = Some(report);
        }
    }
}
