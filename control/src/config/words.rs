//! The closed sets of words that a setting may be, and the word that each is written as.

use crate::words::words;

words! {
    /// The transport of responses.
    ResponsePlane {
        /// A TCP connection for each, or one that many share.
        Tcp = "tcp",
        /// QUIC.
        Quic = "quic",
    }
}

words! {
    /// The transport of relayed responses, between worker and router.
    RelayPlane {
        /// The one that the caller asks for.
        Caller = "caller",
        /// TCP.
        Tcp = "tcp",
        /// QUIC.
        Quic = "quic",
    }
}

words! {
    /// Whether something is done.
    Switch {
        /// It is not.
        Off = "off",
        /// It is.
        On = "on",
    }
}

words! {
    /// Who encrypts once hands are shaken.
    #[derive(Default)]
    KernelTls {
        /// The kernel where it can, else threads of this process.
        #[default]
        Auto = "auto",
        /// Threads of this process.
        Off = "off",
        /// The kernel; a host that cannot is not served on.
        Required = "required",
    }
}

words! {
    /// What happens to an event that a subscriber's queue has no room for.
    Overflow {
        /// It is dropped.
        DropNewest = "drop_newest",
        /// Older ones are dropped for it.
        DropOldest = "drop_oldest",
        /// The subscriber is disconnected.
        Disconnect = "disconnect",
    }
}

words! {
    /// Where instances are found and our endpoints are offered.
    Backend {
        /// This process only, and the static instances.
        Memory = "memory",
        /// A folder shared by processes.
        File = "file",
        /// etcd.
        Etcd = "etcd",
        ; refused "kubernetes"
    }
}

words! {
    /// How an instance is chosen. Meanings as in `spec/request-plane.md` §11.2; `hash` is ours.
    Policy {
        /// One after the other.
        RoundRobin = "round_robin",
        /// Any.
        Random = "random",
        /// The less loaded of two random ones.
        PowerOfTwoChoices = "power_of_two_choices",
        /// The one with the fewest requests in flight.
        LeastLoaded = "least_loaded",
        /// The one that a header names.
        Direct = "direct",
        /// The same one for the same value of a header, as long as it is there.
        Hash = "hash",
        /// The one with most of the prompt in its KV cache, load considered.
        Kv = "kv",
    }
}

words! {
    /// What the load of an instance is taken from.
    LoadSource {
        /// What each core has given it.
        Own = "own",
        /// The requests in its forward-pass metrics.
        ForwardPass = "forward_pass",
        /// The blocks in its KV metrics.
        KvMetrics = "kv_metrics",
    }
}

words! {
    /// Who dials whom for the response.
    Response {
        /// The worker dials the caller.
        Direct = "direct",
        /// The worker dials us, and we dial the caller.
        Relay = "relay",
    }
}

words! {
    /// What the caller's acknowledgement means.
    Ack {
        /// We have it, and fail over ourselves.
        OnForward = "on_forward",
        /// The worker has it: its own answer.
        OnAccept = "on_accept",
    }
}

words! {
    /// What chooses the core of a connection.
    Steering {
        /// The queue where cores have one, else the kernel's hash.
        Auto = "auto",
        /// The kernel's hash.
        Off = "off",
        /// The CPU that handles its first packet.
        Cpu = "cpu",
        /// The queue that its first packet came on.
        Queue = "queue",
    }
}

words! {
    /// What becomes of a connection that comes to a core with more than others.
    Imbalance {
        /// It stays.
        Keep = "keep",
        /// It is handed to the core with the fewest.
        LeastConnections = "least_connections",
    }
}

words! {
    /// What a data core does with nothing to do.
    Idle {
        /// Sleep in the kernel.
        Block = "block",
        /// Poll.
        Spin = "spin",
    }
}

words! {
    /// What a core of `cores.d/` is there for.
    Role {
        /// It takes requests; each of these serves lanes as well.
        Data = "data",
        /// It is the control core.
        Control = "control",
        ; refused "lane"
    }
}

words! {
    /// What the broker of events exchanges events with.
    Bridge {
        /// Nothing.
        Off = "off",
        /// A NATS server.
        Nats = "nats",
        /// Another broker, by ZMQ.
        Zmq = "zmq",
        /// NATS and another broker.
        Both = "both",
    }
}

words! {
    /// Which kernel interface moves bytes.
    Io {
        /// io_uring where it is allowed, else epoll.
        Auto = "auto",
        /// io_uring or nothing: without it the program exits with 78.
        Uring = "uring",
        /// epoll.
        Epoll = "epoll",
    }
}

words! {
    /// Which memory the GPU memory service lends.
    GpuBackend {
        /// The GPU's where there is one, else the host's.
        Auto = "auto",
        /// The host's.
        Host = "host",
        /// The GPU's or none: without it the program exits with 78.
        Cuda = "cuda",
    }
}

words! {
    /// Which generation of the GPU memory service's protocol is spoken (`spec/gpu-memory.md` §0).
    Generation {
        /// D0 and D1, on `gms_<GPU UUID>_<tag>.sock`.
        First = "first",
        /// D2, on `gms_<device>_<tag>.sock`.
        Second = "second",
        /// Both, each on sockets and with memory of its own.
        Both = "both",
    }
}

words! {
    /// What a client that asks for `rw_or_ro` does to a durable layout.
    DurableLayout {
        /// It becomes the writer and replaces it, as upstream's does.
        Replace = "replace",
        /// It waits.
        Keep = "keep",
    }
}

words! {
    /// Under which names a planner's metrics are served (`spec/gpu-memory.md` §7.1).
    PlannerNames {
        /// Those of the first generation, `planner:...`.
        Seed = "seed",
        /// Those of 1.6.1, `dynamo_planner_...`.
        Current = "1.6.1",
        /// Both.
        Both = "both",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip_and_refused_ones_do_not_parse() {
        for word in Policy::WORDS {
            assert_eq!(
                Policy::parse(word.text).map(Policy::as_str),
                Some(word.text)
            );
        }
        for word in Backend::WORDS {
            assert_eq!(
                Backend::parse(word.text).is_some(),
                word.usable,
                "{}",
                word.text
            );
        }
        assert_eq!(Response::parse("relay"), Some(Response::Relay));
    }
}
