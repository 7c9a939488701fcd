//! Whom to ask: --url, PGVIGIL_URL, or the members of the configuration; and what the agents' errors mean here.

use super::{Exit, Failure, Global};
use crate::client::{Client, ClientError, base, member_urls};
use crate::config::{Config, Contact, Secret};

pub fn client(global: &Global) -> Result<Client, Failure> {
    let contact = if global.url.is_empty() { Some(contact(global)?) } else { None };
    let bases = match &contact {
        Some(contact) => member_urls(contact),
        None => global.url.iter().map(|url| base(url)).collect::<Result<_, _>>()?,
    };
    // The configured token is used when this user may read it; who only asks does not need it.
    let configured = || contact.and_then(|c| c.token_file).and_then(|file| std::fs::read_to_string(file).ok());
    let token = match &global.token_file {
        Some(file) => Some(std::fs::read_to_string(file).map_err(|error| {
            Failure::new(Exit::Usage, format!("read {}: {error}", file.display()), "name a file that holds the token")
        })?),
        None => std::env::var("PGVIGIL_API_TOKEN").ok().filter(|t| !t.is_empty()).or_else(configured),
    };
    Ok(Client::of(bases).with_token(token.map(|t| Secret::new(t.trim()))))
}

fn contact(global: &Global) -> Result<Contact, Failure> {
    let path = global.config_path();
    if global.config.is_none() && !path.exists() {
        return Err(Failure::new(
            Exit::Usage,
            format!("no cluster is named: {} does not exist", path.display()),
            "name an agent with --url or PGVIGIL_URL, e.g. --url http://10.0.0.1:8008, or a configuration with --config",
        ));
    }
    Ok(Config::contact(&path)?)
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        let message = error.to_string();
        match error {
            ClientError::Unreachable(_) => Failure::new(
                Exit::Unreachable,
                message,
                "is `pgvigil agent` running there, and is its port open? --url asks another address",
            ),
            ClientError::Unknown(_) => Failure::new(
                Exit::Unknown,
                message,
                "run `pgvigil status`: it shows whether the operation is under way",
            ),
            ClientError::Refused { status, hint, .. } => {
                let exit = match status.as_u16() {
                    503 => Exit::Unreachable,
                    400..=499 => Exit::Refused,
                    _ => Exit::Failed,
                };
                Failure::new(exit, message, hint)
            }
            ClientError::NoUrl { .. } => {
                Failure::new(Exit::Usage, format!("--url {message}"), "write it as http://10.0.0.1:8008")
            }
        }
    }
}
