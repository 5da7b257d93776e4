"""The bounds of lazyfs: what strangers can make it hold, do or wait for, and what it takes of a node.

One bound a line, with its unit and its reason; docs/limits.md is made from this file (tests/helpers/limits_doc.py), and
a test compares them. What is here faces input that others wrote (an image, a registry, a trace, a file of the node, a
client on a socket), or is a share of the node that would grow without it. Settings, with their defaults, are in
`lazyfs.config`; numbers by which an algorithm is tuned stay beside it.
"""

from __future__ import annotations

from lazyfs.units import GiB, KiB, MiB

# -- Manifests, configs, indexes: what an image says of itself

MAX_DOCUMENT = 8 * MiB  # bytes of a manifest, index or config; real ones have some thousand
MAX_LAYERS = 512  # layers of an image; overlayfs and containerd end sooner
MAX_BLOB = 1 << 40  # bytes of a blob; node ids leave 40 bits for rows, and no registry takes a layer of a terabyte
MAX_INDEX_DEPTH = 3  # indexes within indexes
MAX_MANIFESTS = 1024  # manifests of one image that are fetched; an index may name many
MAX_CONFIG_WORDS = 10_000  # words or variables in an image config; the kernel's own bound on argv is of this size
MAX_PASSWD = 16 * MiB  # bytes of an image's passwd or group file
MAX_MEMBERS = 1 << 16  # members of one archive; an image's has a few for each layer
MAX_ARCHIVE_NAMES = 16 * MiB  # bytes of all names and links of one archive
MAX_ARCHIVE_LINKS = 8  # symlinks after one another in an archive
MAX_IMAGES = 1000  # images of one archive of Docker's
MAX_ELF_SEGMENTS = 64  # segments of a program that are looked at, to fetch what it needs ahead
MAX_ELF_DYNAMIC = 1 << 16  # bytes of its dynamic section
MAX_ELF_NEEDED = 256  # libraries that it names
MAX_ELF_STRING = 4096  # bytes of each of their names

# -- TOCs and tars: what a layer says of itself

MAX_TOC = 200 * MiB  # bytes of a TOC, compressed and decompressed alike: half a million files with all their attributes
MAX_STORAGE_TOC = 150 * MiB  # bytes of a TOC that is written for podman; where containers/storage draws the line
MAX_TOC_ITEMS = 4_000_000  # names and chunks of a TOC together
# names of a layer, parents made on the way included; bounds the memory of converter and table builder
MAX_NAMES = 4_000_000
MAX_TAR_ENTRIES = 4_000_000  # entries of one tar stream
MAX_TOC_HEADERS = MiB  # bytes of headers before the JSON of an eStargz TOC
MAX_EXTENSION = MiB  # bytes of one extension header's payload, and of one sparse map
MAX_HEADERS = 4 * MAX_EXTENSION  # bytes of all headers of one entry, extension headers included
MAX_TAR_SEGMENT = 8 * MiB  # bytes of headers of a tar-split at once; longer runs are zeros behind the end
MAX_FILE_SIZE = 1 << 44  # bytes of a file: ext4's largest. More would overflow the data space
MAX_XATTRS = 1 << 17  # bytes of all extended attributes of one entry
MAX_SYMLINKS = 40  # symlinks followed for one path, the kernel's own limit
# parts of symlinks' targets walked for one layer, and for one chain: seconds, where sane ones need none
MAX_FOLLOWED = 10_000_000
MAX_HOLES = 64 * GiB  # bytes of zeros in one layer: a sparse file or a TOC can claim terabytes for nothing
# bytes of distinct extended attributes of a layer, and of names; the column of offsets ends at 4 GiB
MAX_TABLE_HEAP = GiB
MAX_DATA = 1 << 46  # bytes of a layer's data space: far above any layer, far below what overflows an offset
MAX_TAR_OWNERS = 1000  # distinct owners remembered while a tar is read; then they are read anew
MAX_TAR_PARENTS = 1000  # directories remembered while a tar is read
MAX_TIMES = 1 << 16  # distinct times remembered; an attacker's TOC may hold a million
MAX_HELD_ENTRIES = 1 << 16  # entries of a tar that differ from the TOC so far; more is no layer of this TOC
MAX_CHECK_PARENTS = 1 << 12  # directories remembered while a tar is held against its TOC

# -- Frames and chunks: what decompresses

MAX_CHUNK = 64 * MiB  # bytes of a chunk: it is held in memory whole
MAX_INNER = 64 * MiB  # bytes before a chunk in its frame; they are decompressed to get at it
MAX_FRAME = 128 * MiB  # bytes of a frame, decompressed: a chunk of the largest size behind the largest inner offset
MAX_ZSTD_WINDOW = 128 * MiB  # bytes of zstd history; what zstd itself stops at without being asked for more
MAX_DECODED = 16 * MiB  # bytes decoded that may wait to be handed on: 16 KiB of small frames can hold 500 MiB
MAX_FRAMES = 512  # frames of one request: tiny ones must not hold up the loop, nor pile up
MAX_FILE_CHUNKS = 1 << 22  # chunks of one file of a plain layer: 4 TiB, most of it holes
MAX_ZERO_RUNS = 1 << 23  # runs of zeros of one layer that its check remembers, at 16 bytes each
MAX_LAYER_CHUNKS = 1 << 28  # chunks of one layer; a byte each in a file

# -- Traces and prefetch lists: what a stranger says that a start reads

MAX_TRACE = MiB  # bytes of a trace's frame
MAX_READS = 50_000  # reads of one trace, and files
MAX_REQUESTS = 50_000  # requests of one trace
MAX_SPANS = 256  # spans of one trace
MAX_TRACE_LAYERS = 1024  # layers that a trace names
MAX_COMMAND = 1000  # words of the command in a trace
# bytes of a trace's JSON: all reads and requests, with large numbers, and a file of 64 bytes for each
MAX_TRACE_JSON = 8 * MiB
MAX_INLINE = 64 * KiB  # bytes of base64 of a trace that rides in an annotation
MAX_TRACES = 8  # traces of one manifest that are read; with so many there, no more of them ride inline
MAX_TRACE_MANIFEST = 256 * KiB  # bytes of the manifest of a trace's artifact
# compressed bytes in memory that come before their tables, for one start: what 200 Mbit/s bring in 0.3 s
MAX_EARLY_BYTES = 8 * MiB
MAX_SPAN = MiB  # bytes of a span: one that is larger than that is not asked for, nor told of
MAX_AHEAD = 32 * MiB  # uncompressed bytes fetched ahead of one exec
MAX_AHEAD_FILES = 64  # files fetched ahead of one exec
MAX_AHEAD_DEPTH = 4  # scripts whose interpreters are scripts, programs whose libraries need libraries
MAX_PREFETCH_LIST = 16 * MiB  # bytes of a list of what to prefetch
MAX_PATHS = 100_000  # paths in it
MAX_IMAGE_LIST = 4 * MiB  # bytes of a list of images to fetch
LONGEST_START = 86_400.0  # seconds of a start that is recorded, or waited for
LONGEST_NOTES = 60.0  # seconds of a start in which the daemon notes what it reads

# -- What a registry answers

MAX_HEADER = 128 * KiB  # bytes of an answer's header, provisional answers before it included
MAX_REDIRECTS = 5  # redirects followed for one request
MAX_LOCATION = 16 * KiB  # bytes of a Location header; signed URLs have one or two thousand
MAX_LOGIN_TRIES = 4  # logins tried for one request
MAX_CHALLENGE = 8 * KiB  # bytes of a WWW-Authenticate header
MAX_TOKEN = 64 * KiB  # bytes of a token endpoint's answer
MAX_TOKEN_TRIES = 4  # logins that are tried one after another for one token
MAX_DISCARD = 64 * KiB  # bytes of an unwanted body read to keep its connection; more, and the connection goes
MAX_CAUSES = 10  # causes of an error that are looked through
POOL_SIZE = 32  # idle connections kept for each host
MAX_REGISTRY_WORDS = 200  # characters of a registry's own message that are repeated
MAX_IMAGE_WORDS = 600  # characters of what an image says of a layer, or of why it is not lazy, that are repeated
MAX_CONTAINERD_WORDS = 300  # characters of containerd's own message that are repeated
MAX_WAIT = 86_400.0  # seconds; a Retry-After beyond it says nothing more
MAX_SIT_OUT = 3600.0  # seconds; whatever a 429 asks for, its host is tried again then
MAX_REFERRER_PAGES = 20  # pages of a list of referrers
MAX_REFERRERS = 1000  # referrers of one manifest, that are listed
MAX_SIGNED = 1024  # signed URLs remembered for each repository
MAX_HEALTH_HOSTS = 1024  # hosts whose health is remembered
MAX_HEALTH_BLOBS = 4096  # blobs and tags remembered that a host does not have, or keeps to itself
MAX_STAT_HOSTS = 50  # hosts told apart in labels of metrics; a registry may redirect to any number of them
MAX_SERIES = 1000  # combinations of labels of one metric; a bound on mistakes, not a number that is reached
MAX_LINK_HOSTS = 256  # hosts whose link is known; with more, those of which nothing is under way are forgotten
MAX_LIMITS_TOLD = 20  # hosts of which somebody who waits for an image is told that they limit how often they are asked
MAX_OTHER_SOURCES = 3  # further sources of a layer that are remembered
SLOWEST_TRANSFER = 64 * KiB  # bytes a second for which a request without a deadline has time, beside REQUEST_TIMEOUT
SLOWEST_UNPACK = 256 * KiB  # bytes of a layer's blob a second for which containerd has time, when it unpacks one
# bytes a second of a layer that is converted; a source slower than this is given up after SOURCE_GRACE
SLOWEST_SOURCE = 50_000

# -- Configuration and logins

MAX_CONFIG_FILE = 256 * KiB  # bytes of a hosts.toml or registries.conf
MAX_HOST_RULES = 32  # endpoints of one hosts.toml, the server included
MAX_DIAL_TIMEOUT = 300.0  # seconds of a dial_timeout; what says more gets this
MAX_CONF_FILES = 64  # files of one registries.conf.d
MAX_MIRRORS = 31  # mirrors of one registry
MAX_PEM = MiB  # bytes of one file of certificates
MAX_TLS_CONTEXTS = 64  # ways of talking TLS (authorities, certificate) whose files are loaded; the oldest go
MAX_CERTIFICATES = 256  # certificates in one directory
MAX_AUTH_FILE = MiB  # bytes of an auth.json or config.json
MAX_PROGRAM_ANSWER = 64 * KiB  # bytes that a credential program answers; clouds' tokens have a few thousand
MAX_PROGRAM_WORDS = 4 * KiB  # bytes of its complaints that are read
MAX_PROGRAM_LOGINS = 256  # answers of credential programs remembered
MAX_VARIABLE = 16 * KiB  # characters of one environment variable passed on to the daemon; longer ones are left out
MAX_VARIABLES = 256 * KiB  # characters of all of them
MAX_TOLD_LOGINS = 4000  # logins of one call that tells the daemon of them
MAX_LOGIN_PLACES = 1000  # repositories whose logins the daemon keeps; those not told of for longest go
MAX_SEEN_LOGINS = 1000  # repositories whose logins the snapshotter keeps; those not pulled from for longest go
MAX_LOGINS_DOCUMENT = 768 * KiB  # bytes of all of them as JSON; the control socket takes 1 MiB a message
MAX_SECRET = 32 * KiB  # characters of one secret
MAX_LOGIN_LINE = 64 * KiB  # bytes of a login in a file or on standard input; clouds' tokens have a few thousand
MAX_IMAGE_NAME = 4096  # characters of an image's name for which a login is looked up
MAX_NODE_FILE = 8 * MiB  # bytes of a configuration file of the node that `install` changes
MAX_IMPORTS = 100  # files that containerd's configuration imports
MAX_HOST_FILE = MiB  # bytes of the node's hosts or resolv.conf that a container gets

# -- Sockets

MAX_LINE = MiB  # bytes of one message on the control socket
MAX_CLIENTS = 256  # connections to the control socket at once
MAX_REQUEST_ID = 100  # characters of a request's number, which each answer repeats
# the largest size or time that a call may name; more is no size of a store, nor fits where it is compared
MAX_CALL_NUMBER = 1 << 62
MAX_CALL_DEADLINE = 3600.0  # seconds that a call may ask for as its deadline
MAX_PAGE = 512 * KiB  # bytes of one answer to a call that lists, about: a message has half as much again
MAX_SCRAPE_HEAD = 8 * KiB  # bytes of a request for metrics
SCRAPE_BACKLOG = 8  # such requests that wait; they are answered one after another
MAX_GRPC_MESSAGE = 16 * MiB  # bytes of one message of gRPC; containerd's and kubelet's own bound
MAX_GRPC_WORDS = 1000  # characters of an error that the snapshotter answers; the header that carries it is bounded
MAX_LABEL = 4096  # bytes of a label's name and value together, containerd's own bound
MAX_KEY = 4096  # bytes of a snapshot's key
MAX_LABEL_VALUE = 4096  # characters of a label's value that are looked at
MAX_FILTER = 16 * KiB  # characters of one filter of a call that lists
MAX_FILTERS = 100  # filters of one call
MAX_PATTERN = 256  # characters of a regular expression in a filter
MAX_PROGRAM = 1000  # instructions of one, after repeats were written out
MAX_PATTERN_DEPTH = 50  # groups in groups of one
MAX_REASONS = 10_000  # reasons kept of what became of layers; the oldest go
MAX_REASON = 2000  # characters of each part of one
MAX_USAGES = 10_000  # layers whose usage the snapshotter remembers
MAX_EXTRACTIONS = 64  # images whose answers the snapshotter remembers
MAX_REMOVED = 1000  # digests of one call that removes layers; a message has at most MAX_LINE
MAX_REPORT = 64 * KiB  # bytes of one report of a container's supervisor

# -- Memory and disk of the node

# bytes of address space of a process that reads TOCs: one of half a million entries takes a fifth of it
CHILD_MEMORY = 4 * GiB
IDLE_CHILDREN = 2  # such processes that wait for work
STANDBY_WAIT = 60.0  # seconds that one which was started ahead of need waits for its first job
IDLE_WAIT = 3.0  # seconds after which one without further jobs ends, and gives its memory back
MAX_CHILD_ANSWER = MiB  # bytes that one answers: a sentence
DOCUMENTS_BOUND = 256 * MiB  # bytes of all documents in the catalog; those used longest ago go
MAX_TRACE_FILES = 1000  # learned traces on disk
MAX_TRACE_BYTES = 64 * MiB  # bytes of learned traces on disk together
MAX_RECORDS = 100  # recorded traces on disk
MAX_SOURCE = MiB  # bytes of the file that says where a layer is from
MAX_STORED_TOC = GiB  # bytes of a raw TOC that is read back from the store
MAX_CHECKED = 4096  # files, or parts, known to be whole; with one more all are forgotten
MAX_LOG = 8 * MiB  # bytes of a daemon's log, after which its next start begins a new one
MAX_RUNTIME_LOG = MiB  # bytes of a container runtime's log that are looked at
MAX_ATTACHED = 64 * KiB  # bytes of the file that says what `mount` attached
MAX_PRESSURE_FILE = 4 * KiB  # bytes of a file in which the kernel tells of memory; they have some hundred
MAX_OPEN_DIRECTORIES = 500  # directories held open while a disk's usage is summed; what lies deeper isn't counted
MAX_TREES = 400  # trees on disk, two files each; the oldest go when one is built
MAX_TREE_BYTES = 8 * GiB  # bytes of them together: an image may have gigabytes that its layer had no bytes for
MAX_ANSWERS = 64  # answers of registries about traces, remembered
MAX_ANSWER_BYTES = 24 * MiB  # bytes of memory of all of them: one of the largest, or dozens of usual ones
MAX_KEPT_LAYERS = 1024  # pulled layers held for the containers to come, four open files each
KEPT_FOR = 300.0  # seconds from a pull to its container: so long its layers are held, and its first bytes fetched ahead
MAX_DONORS = 16  # layers held open for copying from; a mapped table and three files each
MAX_EARLY = 8  # images fetched ahead at a time; a node that pulls more has enough to do
MAX_PULLED = 64  # pulls whose mount is to come, remembered
MAX_ADVANCES = 8  # starts at a time whose first bytes may come before their tables, see MAX_EARLY_BYTES
# bytes of TOCs that wait for their table to be built; more are fetched again when it is their turn
MAX_WAITING_TOCS = 64 * MiB
MAX_REFUSED = 1000  # malformed TOCs remembered, so that nobody fetches them again
MAX_REACHABLE = 1000  # hosts remembered as being there; with more of them all are asked again
MAX_STREAMS = 64  # sequential readers remembered
# compressed bytes under way ahead of one sequential reader: 2.5 round trips of 1 Gbit/s and 100 ms
MAX_WINDOW = 32 * MiB
MAX_STRETCHES = 1024  # stretches remembered in which small frames are read side by side
MAX_STRIDE_LAYERS = 64  # layers whose reads are looked at for equal distances
MAX_PATTERNS = 64  # such patterns that are followed
MAX_STRIDE_BYTES = 8 * MiB  # bytes ahead of a reader at equal distances
# ranges to be dropped from the page cache, remembered; forgotten ones stay cached until the kernel wants the memory
MAX_COLD_EXTENTS = 4096
MAX_WORK_SIZE = 20 * GiB  # bytes of blobs in a work directory of `convert`
MAX_WORK_RECORDS = 20_000  # records in it
MAX_WORK_RECORD = MiB  # bytes of one
COMPRESSION_MEMORY = 96 * MiB  # bytes of all contexts that compress side by side; at level 19 one takes 18 MiB
MAX_SOURCE_DOCUMENTS = 64 * MiB  # bytes of all manifests and indexes of an image that is converted
MAX_COPIED = 100  # referrers of one manifest that are copied along
MAX_COPIED_BLOB = GiB  # bytes of a blob of one

# -- Queues, and work side by side

HOST_THREADS = 64  # requests to one host at a time, those that nobody waits for any more included
HOST_WHOLE = 16  # of them, layers fetched in full: threads for these are the node's, not the host's
MAX_APART_HOSTS = 256  # hosts remembered there while nothing is under way
# layers that are fetched in full, or wait for their turn; most wait, so that they hold up no other image
WHOLE_THREADS = 128
DOCUMENT_THREADS = 16  # documents and tails of images fetched at once
LOCAL_THREADS = 16  # jobs on chains at once that need the disk alone
BUILDERS = 2  # tables of a chain's layers built at once, of small TOCs and of large ones
BUILT_AT_ONCE = 8  # tables built at once, node-wide
LARGE_AT_ONCE = 2  # of them, those of TOCs of more than 16 MiB, which take a gigabyte each
DECODED_AT_ONCE = 4  # TOCs held against their digest at once: a small one may swell to 200 MiB
READERS = 4  # readers that are looked ahead of at the same time
MAX_AHEAD_STREAMS = 64  # readers remembered, of whom some may be looked ahead of
UNPACK_INPUTS = 8  # reads of 256 KiB of a plain layer's blob that wait for the decoder
UNPACK_BLOCKS = 4  # inflated blocks of at most 1 MiB that wait, for each of the stages behind
IN_FLIGHT = 32  # batches waiting for compression or for the writer, of all layers together: up to 2.1 MiB each
SIDE_BY_SIDE = 4  # layers converted at once: each has buffers of its own, and memory is promised
UPLOADS = 4  # uploads at once
VERIFY_THREADS = 8  # layers that `verify` reads at once
SOURCE_DEPTH = 4  # blocks of 256 KiB between the threads that fetch a layer and convert it
MAX_CALLS = 4096  # calls of containerd and kubelet that run or wait; further ones are refused
CALL_THREADS = 192  # calls of containerd at once; fewer than the daemon takes connections, of which each has one
LIST_THREADS = 16  # calls of containerd at once that wait for the local disk alone
PULL_THREADS = 64  # pulls of kubelet's at once; of their own, since they wait for containerd and that for calls of its
IMAGE_THREADS = 16  # kubelet's other calls at once, that no pull which hangs may hold up
RESTORE_THREADS = 4  # chains of one registry brought back at once after the daemon's death

# -- Waits

GREETING_TIMEOUT = 5.0  # seconds for a daemon to take a connection, and for its greeting
START_TIMEOUT = 30.0  # seconds until a started daemon must listen
STORE_PATIENCE = 10.0  # seconds for a daemon that is starting or ending, of a command that needs its store
DRIVER_PATIENCE = 3.0  # seconds for a daemon that has just started to know its driver
COLD_STOP_TIMEOUT = 30.0  # seconds for the daemon of a store of its own to end
SOCKET_TIMEOUT = 2.0  # seconds for the snapshotter to take a connection
CONTAINERD_SOCKET_TIMEOUT = 1.0  # seconds for containerd to take one, asked why a call to it failed
ADDRESS_TIMEOUT = 10.0  # seconds for an address for metrics to be let go by whoever has it
# seconds without a word from a daemon; a plain image of many gigabytes is fetched inside a call, with events in between
CALL_TIMEOUT = 3600.0
# seconds of the snapshotter's calls of the daemon that ask no registry; twice that for removals
LOCAL_CALL_TIMEOUT = 30.0
USAGE_TIMEOUT = 5.0  # seconds of its calls for the usage of layers: it is asked of every snapshot again and again
DEADLINE_SLACK = 5.0  # seconds that a call may take beyond the deadline that the daemon was given
RETURN_TIMEOUT = 10.0  # seconds that the snapshotter's calls wait for a daemon that systemd is bringing back
LOGIN_TOLD_TIMEOUT = 3.0  # seconds that a pull, or a call that may need a login, waits for the daemon to be told of it
SEND_TIMEOUT = 30.0  # seconds that a client may take to read an answer
SCRAPE_TIMEOUT = 5.0  # seconds that a client has for its request for metrics, and again for taking the answer
CHILD_TIMEOUT = 120.0  # seconds for a table, tree or image to be made
UNPACK_CPU = 120  # seconds of processor time for unpacking any layer: tens of gigabytes of zeros, or millions of names
UNPACK_CPU_RATE = 1_000_000  # bytes of blob for each further second; honest ones need a tenth of it
# seconds in which who unpacks a plain layer takes none of its bytes, or is at its table behind the last
UNPACK_WAIT = 60.0
END_TIMEOUT = 5.0  # seconds for a process of ours to end, told to or killed; one that hangs in the kernel is left to it
LONGEST_TRY = 300.0  # seconds of one request for frames; those that came before its end stay
EARLY_TRY = 30.0  # seconds of a request for what comes before its tables
# seconds of a request to a registry or containerd without a deadline, beside those that its bytes take
REQUEST_TIMEOUT = 300.0
BLOB_TIMEOUT = 6 * 3600.0  # seconds of one blob or document of an image that is pulled or converted; stalls end sooner
SOURCE_GRACE = 600.0  # seconds of a layer that is converted, beside those that its bytes take
HANDSHAKE_TIMEOUT = 2.0  # seconds in which a server that speaks TLS answers a handshake
ALERT_TIMEOUT = 0.2  # seconds for an alert of TLS that is on its way
MIRROR_PATIENCE = 2.0  # seconds until a mirror's answer must have begun, while another source is well
MIRROR_STALL = 2.0  # seconds without a byte of a mirror, while another source is well
MIRROR_PROBE_TIMEOUT = 10.0  # seconds for a host that failed to show whether it is well again
DOCUMENTS_PATIENCE = 60.0  # seconds for the documents of an image that this node never saw
KNOWN_PATIENCE = 10.0  # seconds for them where the last digest would do, and some of its bytes are missing
WHOLE_PATIENCE = 2.0  # seconds for them where everything that the last digest names is here
LISTING_TIMEOUT = 60.0  # seconds for listing what a registry has beside an image: traces, signatures
PROGRAM_TIMEOUT = 15.0  # seconds for a credential program's answer
LOGIN_PATIENCE = 20.0  # seconds for the credential programs of one endpoint, in `doctor`
BUSY_TIMEOUT = 5.0  # seconds to wait for another process's transaction
LOCK_TIMEOUT = 10.0  # seconds to wait for whoever else changes an OCI layout
WORK_LOCK_TIMEOUT = 60.0  # seconds to wait for another run that tidies up the work directory of `convert`
WRITER_TIMEOUT = 60.0  # seconds without a byte of another writer of the same blob to containerd
GATE_TIMEOUT = 5.0  # seconds to wait for others who make a container's directory; they take microseconds
REMOVAL_TIMEOUT = 1.0  # seconds to wait for another process that is removing a layer
ADMIT_TIMEOUT = 1.0  # seconds that a write waits for an eviction under way before it is passed by
EVICTION_TIMEOUT = 10.0  # seconds for an eviction under way to stop, when the store is closed
SETTLE_TIMEOUT = 10.0  # seconds that whoever removes layers waits for what is at work on them, or about to name them
FILL_PATIENCE = 300.0  # seconds without a byte after which the wait for a whole layer fails, where reads wait for ever
TROUBLE_PATIENCE = 30.0  # seconds of the same where the last request has failed
REACHABLE_TIMEOUT = 5.0  # seconds for a registry to say anything
TRACE_ANSWER = 5.0  # seconds for a registry to answer whether it has traces
PROBE_TIMEOUT = 10.0  # seconds for the self-test of the erofs driver
UNIT_TIMEOUT = 180.0  # seconds for systemctl; a unit may take two minutes to start
FUSERMOUNT_TIMEOUT = 30.0  # seconds for fusermount3
DELETE_TIMEOUT = 30.0  # seconds for a runtime's `delete --force`, which waits for processes to die
# seconds for a program that has little to do (a version, a unit's state, maps of ids), or `doctor`'s test mount
TOOL_TIMEOUT = 10.0
READY_PATIENCE = 300.0  # seconds for a start that is recorded to become ready, unless `--timeout` says otherwise
NOTES_TIMEOUT = 3.0  # seconds that the end of the daemon waits for what was learned
NAMESPACES_TIMEOUT = 30.0  # seconds for a container's namespaces to be made
IDMAP_TIMEOUT = 10.0  # seconds for a user namespace to be made, to try an idmapped mount with it
RUNTIME_START = 60.0  # seconds for the runtime to start a container, beside what one lazy read may take
CONSOLE_TIMEOUT = 5.0  # seconds for the runtime, which has connected already, to send a container's terminal
CONTAINER_STOP = 10.0  # seconds between an image's stop signal and SIGKILL, as with docker stop
UNDO_TIMEOUT = 10.0  # seconds for giving up what containerd had begun to unpack
CLEANUP = 60.0  # seconds that a Cleanup may take; what is left is done in the background
GRACE = 5.0  # seconds that calls under way have when the snapshotter is asked to end
INTERRUPT_PATIENCE = 5.0  # seconds that an interrupted command waits for its threads, so that they can tidy up

# -- Requests of the kernel, and daemons that follow each other

MAX_WAITING_REQUESTS = 1024  # requests of one layer at work, some kilobytes each; further ones wait for these
# requests that the kernel sends ahead of answers: all reads of EROFS; 400 readers of one silent image filled 64
MAX_BACKGROUND = 16384
READ_TASKS = 64  # chunks of one read looked for side by side: a layer may have chunks of one byte
MAX_ORDER = 64 * KiB  # bytes of what the holder says to a daemon
INIT_TIMEOUT = 10.0  # seconds for the kernel's first request
HOLDER_TIMEOUT = 5.0  # seconds for another holder of the same directory to end
STOP_TIMEOUT = 25.0  # seconds for a daemon to take its mounts down
CRASH_LOOP = 3  # crashes within CRASH_LOOP_WITHIN after which reads are taken one by one
CRASH_LOOP_WITHIN = 30.0  # seconds in which they count together
MANY_CRASHES = 10  # crashes within CRASH_LOOP_WITHIN beyond which each next daemon waits longer
SERVE_TIMEOUT = 60.0  # seconds for a daemon to serve once it was ordered to
UPGRADE_TIMEOUT = 60.0  # seconds for the new daemon to load and to take over
REPLANT_TIMEOUT = (
    10.0  # seconds for the local disk to give what a mount of a dead daemon needs, and for each of a rehearsal
)
RELEASE_TIMEOUT = 10.0  # seconds for all mounts to be taken away at a daemon's end
CLOSING_TIMEOUT = 5.0  # seconds then for drivers, and for images, to let go
HUNG_AFTER = 60.0  # seconds of silence after which a daemon is ended that hangs, and another one takes over
HOPELESS_CRASHES = 20  # daemons in a row that did not come to serve; then readers get errors rather than wait
LONGEST_PAUSE = 5.0  # seconds between two of these
