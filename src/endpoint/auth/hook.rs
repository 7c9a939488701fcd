//! The gatekeeper as the front's authenticator.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use tokio::io::AsyncWriteExt as _;
use tracing::info;

use super::login::{self, BackendError, Credentials};
use super::{Denied, Gatekeeper, Visitor};
use crate::endpoint::hooks::{Authenticator, BackendLogin, Hello, Proof, Refusal};
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::message;
use crate::endpoint::wire::startup::{Replication, Startup};

#[async_trait]
impl Authenticator for Gatekeeper {
    async fn authenticate(&self, client: &mut Stream, hello: &Hello) -> Result<Proof, Refusal> {
        let startup = &hello.startup;
        // What the backend speaks is not known yet, and only this end may answer: 3.0 is what all of them speak.
        let unknown = startup.protocol_options();
        if startup.minor > 0 || !unknown.is_empty() {
            client.write_all(&message::negotiate(0, &unknown)).await.map_err(gone)?;
        }
        let (user, database) = (startup.user(), startup.database());
        let visitor = Visitor {
            user: &user,
            database: Some(&database),
            replication: startup.replication() == Replication::Physical,
            address: hello.peer.address,
            tls: hello.tls.as_ref(),
            // Believed fronts only have a name (`via`); what they say of the client's leg counts.
            tls_before: hello.peer.via.is_some() && hello.peer.tls,
        };
        let authenticated = Gatekeeper::authenticate(self, client, &visitor).await.map_err(|denied| match denied {
            Denied::Refused(refusal) => refusal,
            Denied::Gone(error) => gone(error),
        })?;
        Ok(Proof::Proven { identity: hello.claimed(), login: Arc::new(Shown(authenticated.credentials)) })
    }
}

/// For a client that hears nothing any more.
fn gone(error: std::io::Error) -> Refusal {
    Refusal::new("08006", format!("connection lost: {error}"))
}

/// What the client has shown.
struct Shown(Credentials);

#[async_trait]
impl BackendLogin for Shown {
    async fn log_in(&self, backend: &mut Stream, startup: &Startup) -> Result<BytesMut, Refusal> {
        // 3.0, as the client was told.
        let startup = Startup { minor: 0, parameters: startup.parameters.clone() };
        let not_now = |error: std::io::Error| Refusal::new("57P03", format!("log in to PostgreSQL: {error}"));
        backend.write_all(&startup.to_bytes()).await.map_err(not_now)?;
        login::log_in(backend, &self.0).await.map_err(|error| match error {
            BackendError::Refused { code, message: text, body } => {
                let field = |code| message::field(&body, code).map(|text| String::from_utf8_lossy(text).into_owned());
                Refusal { sqlstate: known(&code), message: text, detail: field(b'D'), hint: field(b'H') }
            }
            BackendError::Scram(error) => {
                info!(user = startup.user(), %error, "login to the backend failed");
                Refusal::new("28P01", format!("password authentication failed for user \"{}\"", startup.user()))
                    .detail(error.to_string())
            }
            BackendError::Method(why) => Refusal::new("28000", why),
            BackendError::Wire(error) => Refusal::new("57P03", format!("log in to PostgreSQL: {error}")),
        })?;
        Ok(BytesMut::new())
    }
}

/// What PostgreSQL can say before AuthenticationOk.
fn known(code: &str) -> &'static str {
    const CODES: [&str; 10] =
        ["28000", "28P01", "53300", "57P01", "57P02", "57P03", "08P01", "0A000", "08006", "53200"];
    CODES.into_iter().find(|known| *known == code).unwrap_or("28000")
}
