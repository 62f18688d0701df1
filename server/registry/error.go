package registry

import "fmt"

// ErrorKind says in what way a call was wrong.
type ErrorKind int

// The kinds of error.
const (
	Invalid            ErrorKind = iota + 1 // an argument is wrong
	NotFound                                // what was named does not exist
	AlreadyExists                           // what was to be made exists
	FailedPrecondition                      // the state does not allow it
	Contended                               // others kept changing the same records; try again
)

// Error is an error that is the caller's, not the registry's. Every other
// error means that the registry or its store failed.
type Error struct {
	Kind ErrorKind
	Msg  string
}

func (e *Error) Error() string { return e.Msg }

func invalid(format string, args ...any) error {
	return &Error{Kind: Invalid, Msg: fmt.Sprintf(format, args...)}
}
