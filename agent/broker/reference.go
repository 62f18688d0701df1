package broker

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errorDomain and the reasons are what a google.rpc.ErrorInfo says of a
// reference that came to nothing (Broker API §4.8).
const (
	errorDomain = "spiffe.io"

	reasonInvalid     = "WORKLOAD_REFERENCE_INVALID"
	reasonNotFound    = "WORKLOAD_NOT_FOUND"
	reasonNotEntitled = "WORKLOAD_NOT_ENTITLED"
)

func referenceError(code codes.Code, reason, format string, args ...any) error {
	s := status.New(code, fmt.Sprintf(format, args...))
	detailed, err := s.WithDetails(&errdetails.ErrorInfo{Reason: reason, Domain: errorDomain})
	if err != nil {
		return s.Err() // the code alone will do
	}
	return detailed.Err()
}

// pidOf returns the PID that a reference names. Other types than that of the
// standard for a process are not understood: an object of Kubernetes is none
// until there is something here that can look at it.
func pidOf(r *broker.WorkloadReference) (int32, error) {
	invalid := func(format string, args ...any) (int32, error) {
		return 0, referenceError(codes.InvalidArgument, reasonInvalid, format, args...)
	}
	reference := r.GetReference()
	var pid broker.WorkloadPIDReference
	switch {
	case reference.GetTypeUrl() == "":
		return invalid("the reference to a workload is missing")
	case reference.MessageIs(&broker.KubernetesObjectReference{}):
		return invalid("this agent does not resolve references to Kubernetes objects; refer to the process by its PID")
	case !reference.MessageIs(&pid):
		return invalid("the type of the reference, %.200q, is not understood; this agent takes %s", reference.TypeUrl, pid.ProtoReflect().Descriptor().FullName())
	}
	if err := reference.UnmarshalTo(&pid); err != nil {
		return invalid("the reference to a workload is malformed")
	}
	if pid.Pid <= 0 {
		return invalid("pid %d is not one of a process; a PID is positive", pid.Pid)
	}
	return pid.Pid, nil
}
