//! What this agent tells the others: the published view, and how old it is. Never asks PostgreSQL, the store or the loop,
//! so that a stuck loop shows as one. A promise is the state file's: given here, on disk before it is answered.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::state_file::StateFile;
use super::status::Status;
use crate::core::peers::{Answer, Asks, Question, Report, Says, VERSION};
use crate::core::promise::{Promise, may_be_given};
use crate::core::{ClusterName, MemberId};
use crate::ports::{Answering, Clock};

pub struct Answers {
    pub cluster: ClusterName,
    pub state: Arc<Mutex<StateFile>>,
    pub status: watch::Receiver<Option<Arc<Status>>>,
    pub clock: Arc<dyn Clock>,
}

#[async_trait]
impl Answering for Answers {
    async fn answer(&self, question: Question) -> Option<Answer> {
        let status = self.status.borrow().clone()?;
        let me = &status.view.me;
        let refused = |why: String| Says::Refused { why };
        let foreign = match (question.system_identifier, me.system_identifier) {
            (Some(theirs), Some(ours)) => theirs != ours,
            _ => false,
        };
        let says = if question.version != VERSION {
            refused(format!("version {} of the agents' messages is asked for, here it is {VERSION}", question.version))
        } else if question.cluster != self.cluster || foreign {
            refused(format!("this is {} of cluster {}", me.id.name, self.cluster))
        } else if !me.configured.contains(&question.from.name) {
            refused(format!("{} is not in the member list here", question.from.name))
        } else {
            match question.asks {
                Asks::Report => Says::Report(Box::new(Report::of(&status.view, status.at, self.clock.now()))),
                Asks::Promise(promise) => self.promise(&status, &question.from, promise).await,
                Asks::Unknown => refused("this question is not known here".to_owned()),
            }
        };
        Some(Answer {
            version: VERSION,
            cluster: self.cluster.clone(),
            system_identifier: me.system_identifier,
            from: me.id.clone(),
            says,
        })
    }
}

impl Answers {
    async fn promise(&self, status: &Status, from: &MemberId, promise: Promise) -> Says {
        if let Err(why) = may_be_given(&promise, from, &status.view) {
            return Says::Refused { why };
        }
        let (state, clock) = (self.state.clone(), self.clock.clone());
        // An fsync: not on the thread that answers everybody.
        let given = tokio::task::spawn_blocking(move || {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let given = state.promise(promise, clock.now());
            given.map(|given| given.map(|()| (state.durable().highest_term, state.durable().trusted_store())))
        });
        match given.await {
            Ok(Ok(Ok((highest_term, store_id)))) => Says::Promised { highest_term, store_id },
            Ok(Ok(Err(why))) => Says::NotPromised { why },
            Ok(Err(error)) => Says::Refused { why: error.to_string() },
            Err(error) => Says::Refused { why: error.to_string() },
        }
    }
}
