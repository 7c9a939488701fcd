//! Who a client is: rules, SCRAM with PostgreSQL's own verifiers, certificates; and the same client's login to a backend.
//!
//! ```text
//! StartupMessage ──► rules ──► SCRAM with the verifier ──► role may log in? ──► AuthenticationOk, Credentials
//!                    (config)   (cache of pg_authid)                                 │
//!                                                         gate: login::log_in(backend, &credentials)
//! ```
//!
//! No password is ever known here: a proof gives the ClientKey, and that logs in to every backend with the same verifier.
//! Whoever is refused before the proof is told what PostgreSQL tells: nothing about which roles there are.

pub mod cache;
pub mod end_point;
mod hook;
pub mod identity;
pub mod login;
pub mod messages;
pub mod roles;
pub mod rules;
pub mod scram;
pub mod source;
pub mod verifier;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tracing::{debug, info};

use crate::config::access::AccessRule;
use crate::ports::Clock;

use cache::RoleCache;
use identity::ClientCertificate;
use login::Credentials;
use messages::ReadError;
use roles::{Role, Roles};
use rules::{Admission, Claim, Demand};
use scram::{Exchange, Mechanism, Proven, ScramError};
use verifier::{MockSecret, StoredPassword, Verifier};

pub use super::wire::message::Refusal;

/// What is known of a TLS connection.
#[derive(Clone, Debug, Default)]
pub struct TlsFacts {
    /// `tls-server-end-point` of the certificate that we showed; `None` for one that has no such hash.
    pub end_point: Option<Arc<[u8]>>,
    /// Verified.
    pub certificate: Option<ClientCertificate>,
}

/// A client that has sent its startup message.
#[derive(Clone, Copy, Debug)]
pub struct Visitor<'a> {
    pub user: &'a str,
    /// As the client wrote it; `None`: the user's name.
    pub database: Option<&'a str>,
    /// Physical replication.
    pub replication: bool,
    /// `None`: a Unix socket.
    pub address: Option<IpAddr>,
    pub tls: Option<&'a TlsFacts>,
    /// It came over TLS to a front that we believe, and from there to us.
    pub tls_before: bool,
}

/// A client that is who it says.
#[derive(Clone, Debug)]
pub struct Authenticated {
    pub credentials: Credentials,
    /// The rule of `endpoint.allow`, counted from 1.
    pub rule: usize,
}

#[derive(Debug)]
pub enum Denied {
    /// To be told so, and closed.
    Refused(Refusal),
    /// Went away on its own: nothing to say, nobody to tell. psql does so to ask for a password.
    Gone(io::Error),
}

impl From<Refusal> for Denied {
    fn from(refusal: Refusal) -> Denied {
        Denied::Refused(refusal)
    }
}

impl From<io::Error> for Denied {
    fn from(error: io::Error) -> Denied {
        Denied::Gone(error)
    }
}

impl From<ReadError> for Denied {
    fn from(error: ReadError) -> Denied {
        match error {
            ReadError::Gone(error) => Denied::Gone(error),
            ReadError::Protocol(message) => Denied::Refused(Refusal::new("08P01", message)),
        }
    }
}

pub struct Gatekeeper {
    rules: Vec<AccessRule>,
    roles: RoleCache,
    mock: MockSecret,
    clock: Arc<dyn Clock>,
}

impl Gatekeeper {
    pub fn new(rules: Vec<AccessRule>, roles: RoleCache, mock: MockSecret, clock: Arc<dyn Clock>) -> Gatekeeper {
        Gatekeeper { rules, roles, mock, clock }
    }

    /// From the startup message to AuthenticationOk, which has been sent when this returns `Ok`. The caller sets the
    /// deadline. Reads not one byte beyond the client's last message. Dropped in the middle, nothing is left behind but
    /// the connection.
    pub async fn authenticate(
        &self,
        client: &mut (impl AsyncRead + AsyncWrite + Unpin),
        visitor: &Visitor<'_>,
    ) -> Result<Authenticated, Denied> {
        let end_point = visitor.tls.and_then(|tls| tls.end_point.as_deref());
        let claim = Claim {
            user: visitor.user,
            database: visitor.database.unwrap_or(visitor.user),
            replication: visitor.replication,
            address: visitor.address,
            tls: visitor.tls.is_some() || visitor.tls_before,
            certificate: visitor.tls.and_then(|tls| tls.certificate.as_ref()),
        };
        if claim.user.is_empty() {
            return Err(Refusal::new("28000", "no PostgreSQL user name specified in startup packet").into());
        }
        let admission = rules::admission(&self.rules, &claim)?;
        let Some(roles) = self.roles.roles().await else {
            return Err(Refusal::new("57P03", "the endpoint does not know the cluster's roles yet")
                .hint("No PostgreSQL of the cluster has answered since the endpoint was started; try again.")
                .into());
        };
        let role = roles.get(claim.user);
        let mut out = BytesMut::new();
        let credentials = match admission.demand {
            Demand::Scram => {
                let proven = self.prove(client, &claim, &roles, role, end_point).await?;
                messages::proven(&proven.server_final, &mut out);
                Credentials::Scram(proven.keys())
            }
            Demand::Certificate => {
                messages::ok(&mut out);
                Credentials::Certificate
            }
        };
        // As in PostgreSQL these come after AuthenticationOk: they are for the role's owner only.
        client.write_all(&out).await?;
        client.flush().await?;
        self.may_log_in(&claim, role, admission)?;
        debug!(user = claim.user, rule = admission.rule, "authenticated");
        Ok(Authenticated { credentials, rule: admission.rule })
    }

    async fn prove(
        &self,
        client: &mut (impl AsyncRead + AsyncWrite + Unpin),
        claim: &Claim<'_>,
        roles: &Roles,
        role: Option<&Role>,
        end_point: Option<&[u8]>,
    ) -> Result<Proven, Denied> {
        let (verifier, doom) = match self.verifier(role) {
            Ok(verifier) => (verifier, None),
            Err(doom) => (Verifier::mock(&self.mock, claim.user, roles.usual_iterations), Some(doom)),
        };
        let nonce = scram::nonce().map_err(io::Error::other)?;
        let exchange = Exchange { verifier, doomed: doom.is_some(), end_point, nonce };
        match converse(client, exchange).await {
            Err(Failed::Scram(ScramError::Denied)) => {
                let reason = doom.unwrap_or("the proof is wrong: another password");
                info!(user = claim.user, address = ?claim.address, reason, "login refused");
                Err(denied(claim.user, roles).into())
            }
            Err(Failed::Scram(error)) => {
                info!(user = claim.user, address = ?claim.address, reason = %error, "login refused");
                let refusal = Refusal::new(error.sqlstate(), error.to_string());
                Err(error.detail().map_or(refusal.clone(), |detail| refusal.detail(detail)).into())
            }
            Err(Failed::Wire(denied)) => Err(denied),
            Ok(proven) => Ok(proven),
        }
    }

    /// The verifier that the client may try to prove, or why all is in vain.
    fn verifier(&self, role: Option<&Role>) -> Result<Verifier, &'static str> {
        let role = role.ok_or("there is no such role, or it is one of pgvigil's own")?;
        let verifier = match &role.password {
            StoredPassword::Scram(verifier) => verifier,
            StoredPassword::None => return Err("the role has no password"),
            StoredPassword::Md5 => {
                return Err("the role's password is stored as md5: set it again with password_encryption = \
                            'scram-sha-256'");
            }
            StoredPassword::Unreadable => return Err("the role's stored password is of an unknown kind"),
        };
        // CVE-2025-2291 was a pooler that did not look.
        if role.expired(self.clock.unix_ms()) {
            return Err("the role's password has expired (VALID UNTIL)");
        }
        Ok(verifier.clone())
    }

    fn may_log_in(&self, claim: &Claim<'_>, role: Option<&Role>, admission: Admission) -> Result<(), Refusal> {
        let user = claim.user;
        let Some(role) = role else {
            return Err(Refusal::new("28000", format!("role \"{user}\" does not exist")));
        };
        if !role.can_login {
            return Err(Refusal::new("28000", format!("role \"{user}\" is not permitted to log in")));
        }
        if role.superuser && !admission.names_user {
            info!(user, address = ?claim.address, rule = admission.rule, "login of a superuser refused");
            return Err(Refusal::new("28000", format!("superuser \"{user}\" is not let in through the endpoint"))
                .detail(format!(
                    "Rule {} of endpoint.allow says user = \"all\", which leaves superusers out.",
                    admission.rule
                ))
                .hint(format!("Connect to PostgreSQL's own socket, or write a rule with user = \"{user}\".")));
        }
        Ok(())
    }
}

/// The same for a wrong password, a role that is not there, and one that may not come in.
fn denied(user: &str, roles: &Roles) -> Refusal {
    let refusal = Refusal::new("28P01", format!("password authentication failed for user \"{user}\""));
    if roles.md5.is_empty() {
        return refusal;
    }
    // Said to everybody alike, so that it tells nothing of this role.
    refusal.hint(
        "The endpoint takes SCRAM passwords only, and some roles have md5 ones: if this is one, set its password again \
         with password_encryption = 'scram-sha-256'.",
    )
}

enum Failed {
    Scram(ScramError),
    Wire(Denied),
}

impl From<ScramError> for Failed {
    fn from(error: ScramError) -> Failed {
        Failed::Scram(error)
    }
}

impl<E: Into<Denied>> From<E> for Failed
where
    E: WireError,
{
    fn from(error: E) -> Failed {
        Failed::Wire(error.into())
    }
}

/// Errors that end a conversation without anything being known about the password.
trait WireError {}
impl WireError for io::Error {}
impl WireError for ReadError {}
impl WireError for Refusal {}

async fn converse(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    exchange: Exchange<'_>,
) -> Result<Proven, Failed> {
    let offered = scram::mechanisms(exchange.end_point);
    let mut out = BytesMut::new();
    messages::offer(offered, &mut out);
    send(client, &mut out).await?;
    let response = messages::client_response(client).await?;
    let (mechanism, first) =
        messages::initial_response(&response).ok_or_else(|| Refusal::new("08P01", "invalid SASLInitialResponse"))?;
    let chosen = Mechanism::read(mechanism).filter(|_| offered.iter().any(|name| name.as_bytes() == mechanism));
    let mechanism =
        chosen.ok_or_else(|| Refusal::new("08P01", "client selected an invalid SASL authentication mechanism"))?;
    let (challenge, challenged) = match first {
        Some(first) => exchange.challenge(mechanism, first)?,
        // A client may wait for an empty challenge before its first words.
        None => {
            messages::challenge("", &mut out);
            send(client, &mut out).await?;
            exchange.challenge(mechanism, &messages::client_response(client).await?)?
        }
    };
    messages::challenge(&challenge, &mut out);
    send(client, &mut out).await?;
    Ok(challenged.check(&messages::client_response(client).await?)?)
}

async fn send(client: &mut (impl AsyncWrite + Unpin), out: &mut BytesMut) -> io::Result<()> {
    client.write_all(&out.split()).await?;
    client.flush().await
}

#[cfg(test)]
mod tests;
