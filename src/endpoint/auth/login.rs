//! To a backend as the client that has proven itself: with its keys, without its password.

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use super::messages::{self, Asked, ReadError};
use super::scram::{self, Keys, LoginError};

/// What the client has shown.
#[derive(Clone, Debug)]
pub enum Credentials {
    Scram(Keys),
    /// A certificate: nothing that could be shown to a backend.
    Certificate,
}

#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// PostgreSQL's own answer: the body of its ErrorResponse, for the client as it is.
    #[error("{code} {message}")]
    Refused { code: String, message: String, body: Vec<u8> },
    #[error("{0}")]
    Scram(#[from] LoginError),
    /// Its pg_hba.conf asks for something that nobody here can answer.
    #[error("{0}")]
    Method(String),
    #[error("log in to the backend: {0}")]
    Wire(#[from] ReadError),
}

impl From<std::io::Error> for BackendError {
    fn from(error: std::io::Error) -> BackendError {
        BackendError::Wire(error.into())
    }
}

/// From the sent startup message to AuthenticationOk, which is read; not one byte more is.
pub async fn log_in(
    backend: &mut (impl AsyncRead + AsyncWrite + Unpin),
    credentials: &Credentials,
) -> Result<(), BackendError> {
    let mut out = BytesMut::new();
    let mut login = None;
    let mut answered: Option<scram::Answered> = None;
    let mut verified = false;
    loop {
        let message = messages::server_message(backend).await?;
        match message.tag {
            b'E' => {
                let field = |name| messages::error_field(&message.body, name).unwrap_or_default();
                let (code, text) = (field(b'C'), field(b'M'));
                return Err(BackendError::Refused { code, message: text, body: message.body });
            }
            // NegotiateProtocolVersion may come first; notices may not, and harm nobody.
            b'v' | b'N' => continue,
            b'R' => {}
            tag => return Err(unexpected(tag)),
        }
        let keys = match credentials {
            Credentials::Scram(keys) => Some(keys),
            Credentials::Certificate => None,
        };
        match (messages::asked(&message.body), keys) {
            // For a certificate: pg_hba.conf lets this process in without a password (peer with a map).
            (Some(Asked::Nothing), None) => return Ok(()),
            (Some(Asked::Nothing), Some(_)) if verified => return Ok(()),
            (Some(Asked::Nothing), Some(_)) => {
                return Err(BackendError::Method(
                    "the backend lets clients in without asking for a password; put scram-sha-256 into its pg_hba.conf \
                     (postgresql.hba) in place of trust or peer"
                        .to_owned(),
                ));
            }
            (Some(Asked::Sasl(offered)), Some(keys)) if login.is_none() && answered.is_none() => {
                if !offered.contains(&scram::SCRAM_SHA_256.as_bytes()) {
                    return Err(BackendError::Method("the backend does not offer SCRAM-SHA-256".to_owned()));
                }
                let nonce = scram::nonce().map_err(|e| BackendError::Wire(std::io::Error::other(e).into()))?;
                let exchange = login.insert(scram::Login::new(keys, nonce));
                messages::sasl_initial(scram::SCRAM_SHA_256, &exchange.first(), &mut out);
            }
            (Some(Asked::Continue(data)), Some(_)) => {
                let exchange = login.take().ok_or(LoginError::Malformed("a challenge that was not asked for"))?;
                let (response, next) = exchange.answer(data)?;
                answered = Some(next);
                messages::sasl_response(&response, &mut out);
            }
            (Some(Asked::Final(data)), Some(_)) => {
                let exchange = answered.take().ok_or(LoginError::Malformed("an end that was not asked for"))?;
                exchange.verify(data)?;
                verified = true;
            }
            (Some(Asked::Other(_) | Asked::Sasl(_)), _) => {
                return Err(BackendError::Method(method(keys.is_some())));
            }
            (Some(Asked::Continue(_) | Asked::Final(_)) | None, _) => return Err(unexpected(b'R')),
        }
        if !out.is_empty() {
            backend.write_all(&out.split()).await?;
            backend.flush().await?;
        }
    }
}

fn method(scram: bool) -> String {
    if scram {
        "the backend asks for another method than SCRAM-SHA-256: set the role's password again with \
         password_encryption = 'scram-sha-256', and put scram-sha-256 into its pg_hba.conf (postgresql.hba)"
    } else {
        "a client that came with a certificate has no password to show to the backend: let the endpoint's operating \
         system user in by a line `local all <role> peer map=…` of postgresql.hba, or use method = \"scram\" with \
         client_cert = \"verify-full\""
    }
    .to_owned()
}

fn unexpected(tag: u8) -> BackendError {
    BackendError::Wire(ReadError::Protocol(format!("unexpected message type {tag} before AuthenticationOk")))
}
