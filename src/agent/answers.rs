//! What this agent tells the others: the published view, and how old it is. Never asks PostgreSQL, the store or the loop,
//! so that a stuck loop shows as one.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use super::status::Status;
use crate::core::ClusterName;
use crate::core::peers::{Answer, Asks, Question, Report, Says, VERSION};
use crate::ports::{Answering, Clock};

pub struct Answers {
    pub cluster: ClusterName,
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
