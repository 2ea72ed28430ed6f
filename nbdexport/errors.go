package nbdexport

import (
	"errors"

	"csi-qcow2/nbdexport/fuse"
)

// Errors that a caller can act on. Compare with errors.Is.
var (
	// ErrServerClosed: Server.Serve has ended because its context did.
	ErrServerClosed = errors.New("nbdexport: server closed")
	// ErrProtocol: the client broke the protocol in a way that leaves no
	// common position in the stream; its connection was closed.
	ErrProtocol = errors.New("nbdexport: protocol violation")
	// ErrExportExists: the server has an export of this name already.
	ErrExportExists = errors.New("nbdexport: export exists")
	// ErrUnanswered, of a Backend: the request shall have no reply, because the
	// kernel sends it again to the process that reattaches the device.
	ErrUnanswered = fuse.ErrUnanswered
)
