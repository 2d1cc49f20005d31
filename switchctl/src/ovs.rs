//! The daemons of Open vSwitch beside OpenFlow: JSON-RPC on a stream, and what is asked of `ovs-vswitchd` over its
//! control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::core::jsonrpc::{self, Decoder, JsonRpcError, Message};
use crate::net::{self, Stream, SwitchAddr};

/// How long a daemon may take to answer.
const ANSWER_BOUND: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum OvsError {
    /// It cannot be reached, or went away. Try again.
    #[error("{0} cannot be reached: {1}")]
    Unreachable(String, io::Error),
    /// It took too long.
    #[error("no answer within {} s", ANSWER_BOUND.as_secs())]
    Timeout,
    /// It does not speak JSON-RPC. The address is that of something else.
    #[error(transparent)]
    Rpc(#[from] JsonRpcError),
    /// It said no, in its own words.
    #[error("{method} was refused: {error}")]
    Refused {
        /// What was asked.
        method: String,
        /// Its words.
        error: String,
    },
}

/// A connection to a daemon.
pub(crate) struct Channel {
    stream: Box<dyn Stream>,
    decoder: Decoder,
    target: String,
    next_id: u64,
}

impl Channel {
    pub(crate) async fn connect(target: &SwitchAddr) -> Result<Self, OvsError> {
        let name = target.to_string();
        let stream =
            net::connect(target).await.map_err(|error| OvsError::Unreachable(name.clone(), error))?;
        Ok(Self { stream, decoder: Decoder::default(), target: name, next_id: 1 })
    }

    /// Asks, and waits for the answer within a bound.
    pub(crate) async fn call(&mut self, method: &str, params: &Value) -> Result<Value, OvsError> {
        let answered = tokio::time::timeout(ANSWER_BOUND, self.call_unbounded(method, params)).await;
        answered.unwrap_or(Err(OvsError::Timeout))
    }

    async fn call_unbounded(&mut self, method: &str, params: &Value) -> Result<Value, OvsError> {
        let id = self.next_id;
        self.next_id += 1;
        self.write(&jsonrpc::request(id, method, params)).await?;
        loop {
            while let Some(message) = self.decoder.next_message()? {
                match message {
                    Message::Answer { id: theirs, result } if theirs == json!(id) => {
                        return result.map_err(|error| OvsError::Refused {
                            method: method.to_owned(),
                            error: error
                                .as_str()
                                .map_or_else(|| error.to_string(), |text| text.trim().to_owned()),
                        });
                    }
                    Message::Request { id, params, .. } => self.write(&jsonrpc::answer(&id, &params)).await?,
                    Message::Answer { .. } | Message::Notification { .. } => {}
                }
            }
            let mut bytes = [0; 16 << 10];
            match self.stream.read(&mut bytes).await {
                Ok(0) => return Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
                Ok(len) => self.decoder.push(&bytes[..len]),
                Err(error) => return Err(self.lost(error)),
            }
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), OvsError> {
        let written = async {
            self.stream.write_all(bytes).await?;
            self.stream.flush().await
        };
        written.await.map_err(|error| self.lost(error))
    }

    fn lost(&self, error: io::Error) -> OvsError {
        OvsError::Unreachable(self.target.clone(), error)
    }
}

/// Asks `ovs-vswitchd` to answer when a sweep of its datapath cache has ended.
///
/// # Errors
/// [`OvsError`]; then nothing is known of the cache.
pub(crate) async fn revalidator_wait(control: &Path) -> Result<(), OvsError> {
    let mut channel = Channel::connect(&SwitchAddr::Unix(control_socket(control))).await?;
    channel.call("revalidator/wait", &json!([])).await.map(drop)
}

/// The control socket in a run directory; what is no directory is the socket itself.
fn control_socket(path: &Path) -> PathBuf {
    match std::fs::read_to_string(path.join("ovs-vswitchd.pid")) {
        Ok(pid) => path.join(format!("ovs-vswitchd.{}.ctl", pid.trim())),
        Err(_) => path.to_owned(),
    }
}
