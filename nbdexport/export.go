package nbdexport

// An Export is a Backend with the name and the promises under which clients
// find it.
type Export struct {
	Name        string // up to 4096 bytes of UTF-8; "" is what clients get who name none
	Description string // for people, up to 4096 bytes; "" for none
	Backend     Backend
	// ReadOnly refuses every change with EPERM and says so to clients.
	ReadOnly bool
}

// TransmissionFlags returns what the server promises for e: for the kernel,
// which takes part in no handshake, they go into its SERVER_FLAGS attribute.
func (e *Export) TransmissionFlags() TransmissionFlags {
	flags := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagSendDF | FlagCanMultiConn | FlagSendCache
	if e.ReadOnly {
		return flags | FlagReadOnly
	}
	return flags | FlagSendTrim | FlagSendWriteZeroes | FlagSendFastZero
}
