package driver

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// Errors of this package; what they mean to a caller is their row in the table.
var (
	errInvalid      = errors.New("invalid argument")
	errPrecondition = errors.New("not possible in this state")
	errIncompatible = errors.New("exists with other arguments")
	errTopology     = errors.New("not accessible from this node")
	errLimit        = errors.New("too many volumes")
	errNoPool       = errors.New("no such pool")
	errUnavailable  = errors.New("unavailable")
	errNotHere      = errors.New("not found")
	errRange        = errors.New("size out of range")
	// errUndo: a failed change could not be undone; the node may not be clean.
	errUndo = errors.New("could not be undone")
)

// codeTable is the only place where an error becomes a code. The first row
// that matches counts. COs read all codes as final except Aborted, Unavailable,
// Canceled and DeadlineExceeded (and kubelet, ResourceExhausted): a final code
// promises that nothing of the call is still attached or mounted.
var codeTable = []struct {
	err  error
	code codes.Code
}{
	{errUndo, codes.Aborted},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},

	{errInvalid, codes.InvalidArgument},
	{errPrecondition, codes.FailedPrecondition},
	{errIncompatible, codes.AlreadyExists},
	{errTopology, codes.ResourceExhausted},
	{errLimit, codes.ResourceExhausted},
	{errNoPool, codes.InvalidArgument}, // see also CreateVolume
	{errUnavailable, codes.Unavailable},
	{errNotHere, codes.NotFound},
	{errRange, codes.OutOfRange},

	{volume.ErrInvalid, codes.InvalidArgument},
	{volume.ErrNotFound, codes.NotFound},
	{volume.ErrIncompatible, codes.AlreadyExists},
	{volume.ErrOutOfRange, codes.OutOfRange},
	{volume.ErrInUse, codes.FailedPrecondition},
	{volume.ErrBusy, codes.Aborted},
	{volume.ErrNoSpace, codes.ResourceExhausted},
	{volume.ErrTooDeep, codes.ResourceExhausted},
	{volume.ErrBadToken, codes.Aborted}, // CSI ListVolumes: "starting_token is not valid"
	{volume.ErrDamaged, codes.DataLoss},
	{volume.ErrPoolInUse, codes.FailedPrecondition},
	{volume.ErrNotPool, codes.FailedPrecondition},
	{volume.ErrClosed, codes.Unavailable},

	{nbdexport.ErrDeviceBusy, codes.Aborted},
	{nbdexport.ErrNotFlushed, codes.DataLoss},
	{nbdexport.ErrDeviceGone, codes.Unavailable},
	{nbdexport.ErrDeviceDead, codes.Unavailable},
	{nbdexport.ErrDeviceReconnecting, codes.Unavailable},
	{nbdexport.ErrNoDeviceKind, codes.FailedPrecondition},
	{nbdexport.ErrServerClosed, codes.Unavailable},
	{nbdexport.ErrProtocol, codes.Internal},
	{nbdexport.ErrExportExists, codes.Internal},
	{nbdexport.ErrUnanswered, codes.Unavailable},

	{qcow2.ErrCorrupt, codes.DataLoss},
	{qcow2.ErrNotQcow2, codes.DataLoss},
	{qcow2.ErrUnsupported, codes.InvalidArgument}, // CSI CreateVolume: source incompatible
	{qcow2.ErrReadOnly, codes.FailedPrecondition},
	{qcow2.ErrClosed, codes.Unavailable},
	{qcow2.ErrFailed, codes.Unavailable}, // until it is reopened and verified
	{qcow2.ErrOutOfRange, codes.OutOfRange},
	{qcow2.ErrLocked, codes.FailedPrecondition},
	{qcow2.ErrSnapshotNotFound, codes.NotFound},
	{qcow2.ErrSnapshotExists, codes.AlreadyExists},
	{qcow2.ErrTooManySnapshots, codes.ResourceExhausted},
	{qcow2.ErrRefcountOverflow, codes.ResourceExhausted},
	{qcow2.ErrTooLarge, codes.OutOfRange},

	{unix.ENOSPC, codes.ResourceExhausted},
	{unix.EDQUOT, codes.ResourceExhausted},
}

// codeOf returns the code of err.
func codeOf(err error) codes.Code {
	if err == nil {
		return codes.OK
	}
	for _, row := range codeTable {
		if errors.Is(err, row.err) {
			return row.code
		}
	}
	return codes.Internal
}

// toStatus makes err fit to leave the process.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err // of an RPC that is not offered
	}
	return status.Error(codeOf(err), err.Error())
}
