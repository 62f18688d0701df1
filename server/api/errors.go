package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/kms"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// callError is an error as a caller sees it: a gRPC code and a text. What the
// caller must not see, the cause, is kept for the log.
type callError struct {
	code  codes.Code
	text  string
	cause error
}

func (e *callError) Error() string                  { return e.text }
func (e *callError) Unwrap() error                  { return e.cause }
func (e *callError) GRPCStatus() *grpcstatus.Status { return grpcstatus.New(e.code, e.text) }

// internalText is all that a caller learns of a failure that is the server's.
const internalText = "internal error; the server's log says what failed"

// callErrorf makes an error with a code that has no kind of its own below.
func callErrorf(code codes.Code, format string, args ...any) error {
	return &callError{code: code, text: fmt.Sprintf(format, args...)}
}

// permissionDenied makes the error of an agent that is not, or no longer,
// admitted. The reason tells a SPIRE agent what to do about it.
func permissionDenied(reason types.PermissionDeniedDetails_Reason, text string) error {
	st := grpcstatus.New(codes.PermissionDenied, text)
	if detailed, err := st.WithDetails(&types.PermissionDeniedDetails{Reason: reason}); err == nil {
		st = detailed
	}
	return st.Err()
}

// invalidArgument makes the error of a request that can never succeed.
func invalidArgument(format string, args ...any) error {
	return callErrorf(codes.InvalidArgument, format, args...)
}

// status turns an error of any layer below into the one that a call returns,
// with the gRPC code that its kind has. It is the one place that decides codes.
// An error that is no caller's fault becomes Internal without its text;
// [hiddenCause] finds it for the log.
func status(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *grpcstatus.Status }); ok {
		return err // decided already
	}
	var (
		call     *callError
		records  *registry.Error
		issuance *issue.InvalidError
		above    *authority.UpstreamError
	)
	switch {
	case errors.As(err, &call):
		return &callError{code: call.code, text: err.Error(), cause: call.cause}
	case errors.As(err, &records):
		return &callError{code: recordCode(records.Kind), text: err.Error()}
	case errors.As(err, &issuance):
		return &callError{code: codes.InvalidArgument, text: err.Error()}
	case errors.Is(err, authority.ErrUnavailable):
		return &callError{code: codes.Unavailable, text: authority.ErrUnavailable.Error()}
	case errors.Is(err, kms.ErrUnavailable): // the key manager has logged why
		return &callError{code: codes.Unavailable, text: kms.ErrUnavailable.Error()}
	case errors.As(err, &above):
		return &callError{code: codes.Unavailable, text: err.Error()}
	case errors.Is(err, attestors.ErrUnavailable):
		return &callError{code: codes.Unavailable, text: attestors.ErrUnavailable.Error()}
	case errors.Is(err, store.ErrTooLarge):
		return &callError{code: codes.InvalidArgument, text: fmt.Sprintf("what was to be stored is too large; a record may be %d bytes", store.MaxValue)}
	case errors.Is(err, store.ErrNoQuorum):
		return &callError{code: codes.Unavailable, text: "nothing can be written now: no majority of the servers can be reached, and whether this was written is not known; try again", cause: err}
	case errors.Is(err, store.ErrFull):
		return &callError{code: codes.Unavailable, text: "nothing can be written now: the store has no room left; the server's log says what to do", cause: err}
	case errors.Is(err, store.ErrClosed):
		return &callError{code: codes.Unavailable, text: "the server is stopping; try again"}
	case errors.Is(err, context.Canceled):
		return &callError{code: codes.Canceled, text: "the call was cancelled"}
	case errors.Is(err, context.DeadlineExceeded):
		return &callError{code: codes.DeadlineExceeded, text: "the call's deadline has passed"}
	}
	return &callError{code: codes.Internal, text: internalText, cause: err}
}

func recordCode(kind registry.ErrorKind) codes.Code {
	switch kind {
	case registry.Invalid:
		return codes.InvalidArgument
	case registry.NotFound:
		return codes.NotFound
	case registry.AlreadyExists:
		return codes.AlreadyExists
	case registry.FailedPrecondition:
		return codes.FailedPrecondition
	case registry.Contended:
		return codes.Aborted
	}
	return codes.Unknown
}

// hiddenCause returns what failed in the server when a call's error keeps it
// from the caller, or nil.
func hiddenCause(err error) error {
	var call *callError
	if errors.As(err, &call) && call.code == codes.Internal {
		return call.cause
	}
	return nil
}

// itemStatus is [status] for one item of a batch. There is no error for an
// interceptor to see, so it logs a failure of the server itself.
func itemStatus(log *slog.Logger, err error) *types.Status {
	if err == nil {
		return &types.Status{Code: int32(codes.OK), Message: "OK"}
	}
	err = status(err)
	if cause := hiddenCause(err); cause != nil {
		log.Error("an item of a batch failed", "error", cause)
	}
	st := grpcstatus.Convert(err)
	return &types.Status{Code: int32(st.Code()), Message: st.Message()}
}
