package nbdexport

import "fmt"

// Magic numbers.
//
// Spec: NBD proto.md "Handshake", "Request message", "Reply message".
const (
	magicServer        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption        = 0x49484156454f5054 // "IHAVEOPT"
	magicOptionReply   = 0x0003e889045565a9
	magicRequest       = 0x25609513
	magicRequestExt    = 0x21e41c71
	magicSimpleReply   = 0x67446698
	magicChunk         = 0x668e33ef
	magicChunkExtended = 0x6e8a278c
)

// Bounds on what a client may ask for.
const (
	maxOptions       = 32       // per handshake
	maxOptionBytes   = 64 << 10 // of one option's data
	maxString        = 4096     // bytes of a name, a description or a query
	maxPayload       = 32 << 20 // bytes of one read or write
	preferredBlock   = 4096     // bytes; smaller requests work but may cost a read
	maxStatusExtents = 4096     // descriptors in one block status chunk
)

// Flags of the server's greeting and of the client's answer.
//
// Spec: NBD proto.md "Handshake flags", "Client flags".
const (
	handshakeFixedNewstyle = 1 << 0
	handshakeNoZeroes      = 1 << 1
)

// TransmissionFlags are what a server announces about an export.
//
// Spec: NBD proto.md "Transmission flags".
type TransmissionFlags uint16

// Bits of TransmissionFlags.
const (
	FlagHasFlags        TransmissionFlags = 1 << 0
	FlagReadOnly        TransmissionFlags = 1 << 1
	FlagSendFlush       TransmissionFlags = 1 << 2
	FlagSendFUA         TransmissionFlags = 1 << 3
	FlagRotational      TransmissionFlags = 1 << 4
	FlagSendTrim        TransmissionFlags = 1 << 5
	FlagSendWriteZeroes TransmissionFlags = 1 << 6
	FlagSendDF          TransmissionFlags = 1 << 7
	FlagCanMultiConn    TransmissionFlags = 1 << 8
	FlagSendResize      TransmissionFlags = 1 << 9
	FlagSendCache       TransmissionFlags = 1 << 10
	FlagSendFastZero    TransmissionFlags = 1 << 11
)

// option is what a client asks for during the handshake.
//
// Spec: NBD proto.md "Option types".
type option uint32

const (
	optExportName      option = 1
	optAbort           option = 2
	optList            option = 3
	optPeekExport      option = 4 // withdrawn
	optStartTLS        option = 5
	optInfo            option = 6
	optGo              option = 7
	optStructuredReply option = 8
	optListMetaContext option = 9
	optSetMetaContext  option = 10
	optExtendedHeaders option = 11
)

var optionNames = map[option]string{
	optExportName:      "EXPORT_NAME",
	optAbort:           "ABORT",
	optList:            "LIST",
	optPeekExport:      "PEEK_EXPORT",
	optStartTLS:        "STARTTLS",
	optInfo:            "INFO",
	optGo:              "GO",
	optStructuredReply: "STRUCTURED_REPLY",
	optListMetaContext: "LIST_META_CONTEXT",
	optSetMetaContext:  "SET_META_CONTEXT",
	optExtendedHeaders: "EXTENDED_HEADERS",
}

func (o option) String() string { return nameOf(optionNames, o, "option") }

// optionReply is the type of the server's answer to an option.
//
// Spec: NBD proto.md "Option reply types".
type optionReply uint32

const (
	repAck         optionReply = 1
	repServer      optionReply = 2
	repInfo        optionReply = 3
	repMetaContext optionReply = 4

	repErrUnsupported   optionReply = 1<<31 + 1
	repErrPolicy        optionReply = 1<<31 + 2
	repErrInvalid       optionReply = 1<<31 + 3
	repErrPlatform      optionReply = 1<<31 + 4
	repErrTLSRequired   optionReply = 1<<31 + 5
	repErrUnknown       optionReply = 1<<31 + 6
	repErrShutdown      optionReply = 1<<31 + 7
	repErrBlockSize     optionReply = 1<<31 + 8
	repErrTooBig        optionReply = 1<<31 + 9
	repErrExtHeaderReqd optionReply = 1<<31 + 10
)

var optionReplyNames = map[optionReply]string{
	repAck:              "ACK",
	repServer:           "SERVER",
	repInfo:             "INFO",
	repMetaContext:      "META_CONTEXT",
	repErrUnsupported:   "ERR_UNSUP",
	repErrPolicy:        "ERR_POLICY",
	repErrInvalid:       "ERR_INVALID",
	repErrPlatform:      "ERR_PLATFORM",
	repErrTLSRequired:   "ERR_TLS_REQD",
	repErrUnknown:       "ERR_UNKNOWN",
	repErrShutdown:      "ERR_SHUTDOWN",
	repErrBlockSize:     "ERR_BLOCK_SIZE_REQD",
	repErrTooBig:        "ERR_TOO_BIG",
	repErrExtHeaderReqd: "ERR_EXT_HEADER_REQD",
}

func (r optionReply) String() string { return nameOf(optionReplyNames, r, "option reply") }

// info is a kind of information about an export that INFO and GO return.
//
// Spec: NBD proto.md "NBD_OPT_INFO".
type info uint16

const (
	infoExport      info = 0
	infoName        info = 1
	infoDescription info = 2
	infoBlockSize   info = 3
)

var infoNames = map[info]string{
	infoExport:      "EXPORT",
	infoName:        "NAME",
	infoDescription: "DESCRIPTION",
	infoBlockSize:   "BLOCK_SIZE",
}

func (i info) String() string { return nameOf(infoNames, i, "info") }

// command is the type of a request.
//
// Spec: NBD proto.md "Request types".
type command uint16

const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisconnect  command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdWriteZeroes command = 6
	cmdBlockStatus command = 7
)

var commandNames = map[command]string{
	cmdRead:        "READ",
	cmdWrite:       "WRITE",
	cmdDisconnect:  "DISC",
	cmdFlush:       "FLUSH",
	cmdTrim:        "TRIM",
	cmdCache:       "CACHE",
	cmdWriteZeroes: "WRITE_ZEROES",
	cmdBlockStatus: "BLOCK_STATUS",
}

func (c command) String() string { return nameOf(commandNames, c, "command") }

// commandFlags modify a request.
//
// Spec: NBD proto.md "Command flags".
type commandFlags uint16

const (
	flagFUA        commandFlags = 1 << 0 // durable before the reply
	flagNoHole     commandFlags = 1 << 1 // zeroes, but keep the space
	flagDF         commandFlags = 1 << 2 // do not fragment the reply
	flagReqOne     commandFlags = 1 << 3 // one extent is enough
	flagFastZero   commandFlags = 1 << 4 // fail rather than write zeroes out
	flagPayloadLen commandFlags = 1 << 5 // length counts payload (extended headers)
)

var commandFlagNames = []struct {
	flag commandFlags
	name string
}{
	{flagFUA, "FUA"},
	{flagNoHole, "NO_HOLE"},
	{flagDF, "DF"},
	{flagReqOne, "REQ_ONE"},
	{flagFastZero, "FAST_ZERO"},
	{flagPayloadLen, "PAYLOAD_LEN"},
}

func (f commandFlags) String() string {
	s := ""
	for _, n := range commandFlagNames {
		if f&n.flag != 0 {
			s += "|" + n.name
			f &^= n.flag
		}
	}
	if f != 0 {
		s += fmt.Sprintf("|%#x", uint16(f))
	}
	if s == "" {
		return "0"
	}
	return s[1:]
}

// chunk is the type of a structured or extended reply chunk. Those with bit 15
// set are errors.
//
// Spec: NBD proto.md "Structured reply types".
type chunk uint16

const (
	chunkNone           chunk = 0
	chunkOffsetData     chunk = 1
	chunkOffsetHole     chunk = 2
	chunkBlockStatus    chunk = 5
	chunkBlockStatusExt chunk = 6
	chunkError          chunk = 1<<15 + 1
	chunkErrorOffset    chunk = 1<<15 + 2
)

var chunkNames = map[chunk]string{
	chunkNone:           "NONE",
	chunkOffsetData:     "OFFSET_DATA",
	chunkOffsetHole:     "OFFSET_HOLE",
	chunkBlockStatus:    "BLOCK_STATUS",
	chunkBlockStatusExt: "BLOCK_STATUS_EXT",
	chunkError:          "ERROR",
	chunkErrorOffset:    "ERROR_OFFSET",
}

func (c chunk) String() string { return nameOf(chunkNames, c, "chunk") }

// chunkDone marks the last chunk of a reply.
const chunkDone = 1 << 0

// State flags of base:allocation extents.
//
// Spec: NBD proto.md "base:allocation metadata context".
const (
	stateHole = 1 << 0
	stateZero = 1 << 1
)

// metaContext numbers the metadata contexts; it is the ID on the wire too, and
// a bit 1<<context in a set of them.
type metaContext uint32

const (
	contextAllocation metaContext = 1
	contextDepth      metaContext = 2
)

// metaContexts lists the contexts that every export has, in the order in which
// they are listed and reported.
var metaContexts = []struct {
	id   metaContext
	name string
}{
	{contextAllocation, "base:allocation"},
	{contextDepth, "qemu:allocation-depth"},
}

// nameOf returns the name of v, or kind and number for one that has none.
func nameOf[T interface {
	comparable
	~uint16 | ~uint32
}](names map[T]string, v T, kind string) string {
	if name, ok := names[v]; ok {
		return name
	}
	return fmt.Sprintf("%s %#x", kind, uint32(v))
}
