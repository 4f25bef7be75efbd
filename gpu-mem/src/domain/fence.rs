//! Keeps both pools of a GPU closed while a checkpoint of the service is taken
//! (`spec/gpu-memory.md` §3.10, the second generation only).

use super::{Action, Checkpoint, Domain, Turn, v2};
use crate::lock::ClientId;
use crate::protocol::v2::{CheckpointStateResponse, Reply};

/// The checkpoint of one GPU's pools.
#[derive(Debug, Default)]
pub struct Fence {
    token: Option<String>,
    /// The last token and whether its checkpoint was completed: repeating that answer is no error.
    resolved: Option<(String, bool)>,
}

impl Fence {
    /// Does what a control request asks, and answers and closes its connection, which belongs to
    /// `domains[asked]`.
    pub fn control(
        &mut self,
        domains: &mut [&mut Domain],
        asked: usize,
        client: ClientId,
        request: Checkpoint,
        turn: &mut Turn<'_>,
    ) {
        let done = match request {
            Checkpoint::Prepare => self.prepare(domains),
            Checkpoint::Query => Ok(()),
            Checkpoint::Abort(token) => self.resolve(domains, token, false),
            Checkpoint::Complete(token) => self.resolve(domains, token, true),
        };
        let frame = match done {
            Ok(()) => Reply::from(self.state()).encode(),
            Err(text) => v2::error(text, false),
        };
        turn.actions.push(Action::Send {
            client,
            frame,
            descriptor: None,
        });
        if let Some(domain) = domains.get_mut(asked) {
            domain.close(client, turn);
        }
    }

    fn state(&self) -> CheckpointStateResponse {
        let state = if self.token.is_some() {
            "checkpoint_ready"
        } else {
            "serving"
        };
        CheckpointStateResponse {
            state: state.to_owned(),
            token: self.token.clone(),
        }
    }

    /// Asking again while the fence stands answers the same token.
    fn prepare(&mut self, domains: &mut [&mut Domain]) -> Result<(), String> {
        if self.token.is_some() {
            return Ok(());
        }
        for domain in domains.iter() {
            let (standing, (count, _)) = (domain.standing(), domain.usage());
            let holds = match domain.config().tag.as_str() {
                "kv_cache" => !standing.committed && count == 0,
                _ => standing.committed && count > 0,
            };
            let idle = !standing.has_writer && standing.readers == 0 && standing.waiters == 0;
            if !(holds && idle) {
                let tag = &domain.config().tag;
                return Err(format!(
                    "{tag} is not ready for a checkpoint: weights must be committed, kv_cache \
                     empty, and both without sessions"
                ));
            }
        }
        for domain in domains.iter_mut() {
            domain.lock.fence().map_err(|denied| denied.to_string())?;
        }
        self.token = Some(uuid::Uuid::new_v4().to_string());
        Ok(())
    }

    fn resolve(
        &mut self,
        domains: &mut [&mut Domain],
        token: String,
        completed: bool,
    ) -> Result<(), String> {
        if self.token.as_ref() == Some(&token) {
            domains.iter_mut().for_each(|domain| domain.lock.unfence());
            self.token = None;
            self.resolved = Some((token, completed));
            return Ok(());
        }
        match &self.resolved {
            Some((last, how)) if *last == token && *how == completed => Ok(()),
            Some((last, _)) if *last == token => {
                Err("the checkpoint was resolved the other way".into())
            }
            _ => Err("no checkpoint has this token".into()),
        }
    }
}
