//! The daemons of Open vSwitch beside OpenFlow: JSON-RPC on a stream, what is asked of `ovs-vswitchd` over its control
//! socket, and transactions of its database.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::core::jsonrpc::{self, Decoder, JsonRpcError, Message};
use crate::core::ovsdb::{self, BridgeSpec, OvsdbError, Plan, Present};
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
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
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
    /// The database refused, or what it holds is in the way.
    #[error(transparent)]
    Database(#[from] OvsdbError),
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
        answered.unwrap_or(Err(OvsError::Timeout(ANSWER_BOUND)))
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

/// A connection to the database of Open vSwitch.
pub struct Database(Channel);

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Database").field(&self.0.target).finish()
    }
}

impl Database {
    /// Connects to where `ovsdb-server` listens: `db.sock` in its run directory, or TCP or TLS.
    ///
    /// # Errors
    /// [`OvsError::Unreachable`].
    pub async fn connect(target: &SwitchAddr) -> Result<Self, OvsError> {
        Channel::connect(target).await.map(Self)
    }

    /// Carries out operations as one transaction.
    ///
    /// # Errors
    /// [`OvsError`]; when the database refused an operation nothing was changed.
    pub async fn transact(&mut self, operations: Vec<Value>) -> Result<Vec<Value>, OvsError> {
        let mut parameters = vec![json!(ovsdb::DATABASE)];
        parameters.extend(operations);
        Ok(ovsdb::results(self.0.call("transact", &Value::Array(parameters)).await?)?)
    }

    /// What it has.
    ///
    /// # Errors
    /// [`OvsError`].
    pub async fn read(&mut self) -> Result<Present, OvsError> {
        Ok(Present::parse(&self.transact(ovsdb::read()).await?)?)
    }
}

/// Between two looks whether the daemon has carried out a change.
const LOOK: Duration = Duration::from_millis(20);
/// How long the daemon may take to carry out a change.
const CARRY_OUT_BOUND: Duration = Duration::from_secs(10);

/// What became of a bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetUp {
    /// What was changed, for people.
    pub changes: Vec<String>,
    /// What is still not as it should be.
    pub problems: Vec<String>,
}

impl Database {
    /// What would have to change.
    ///
    /// # Errors
    /// [`OvsError`].
    pub async fn plan(&mut self, spec: &BridgeSpec) -> Result<Plan, OvsError> {
        Ok(ovsdb::plan(spec, &self.read().await?)?)
    }

    /// Brings a bridge to what it should be, and waits until the daemon has carried that out.
    ///
    /// # Errors
    /// [`OvsError`]; when the database refused, nothing was changed.
    pub async fn set_up(&mut self, spec: &BridgeSpec) -> Result<SetUp, OvsError> {
        let Plan { changes, operations } = self.plan(spec).await?;
        if !operations.is_empty() {
            self.transact(operations).await?;
        }
        let wanted = self.read().await?.next_cfg;
        let done = async {
            loop {
                let present = self.read().await?;
                if present.cur_cfg >= wanted {
                    return Ok::<_, OvsError>(present.problems(spec));
                }
                tokio::time::sleep(LOOK).await;
            }
        };
        let problems = tokio::time::timeout(CARRY_OUT_BOUND, done).await.unwrap_or_else(|_| {
            let seconds = CARRY_OUT_BOUND.as_secs();
            Ok(vec![format!("ovs-vswitchd has not carried it out within {seconds} s: does it run?")])
        })?;
        Ok(SetUp { changes, problems })
    }
}

/// The control socket in a run directory; what is no directory is the socket itself.
fn control_socket(path: &Path) -> PathBuf {
    match std::fs::read_to_string(path.join("ovs-vswitchd.pid")) {
        Ok(pid) => path.join(format!("ovs-vswitchd.{}.ctl", pid.trim())),
        Err(_) => path.to_owned(),
    }
}
