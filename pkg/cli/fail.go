package cli

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// Exit statuses, the same for every command; each command's help lists them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitDenied      = 4
	exitUnreachable = 5
)

// failure is an error that says more than its text.
type failure struct {
	code   int // exit status
	err    error
	remedy string // what to do about it, in lines of its own; may be empty
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func usageError(err error) error { return &failure{code: exitUsage, err: err} }

// statusError ends the process with a status and says nothing: whatever there
// is to say was said.
type statusError int

func (s statusError) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// report prints an error and returns the exit status.
func (a *app) report(ctx context.Context, cmd *cobra.Command, err error) int {
	var quiet statusError
	if errors.As(err, &quiet) {
		return int(quiet)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return exitFailed // interrupted; the user knows
	}
	code, remedy := exitFailed, ""
	var f *failure
	if errors.As(err, &f) {
		code, remedy = f.code, f.remedy
	}
	if code == exitUsage && remedy == "" {
		remedy = fmt.Sprintf("%q says how it is used.", cmd.CommandPath()+" --help")
	}
	fmt.Fprintf(a.err, "%s %v\n", a.errStyle.red("hallmark:"), err)
	if remedy != "" {
		fmt.Fprintln(a.err, a.errStyle.dim(indent(remedy, "  ")))
	}
	return code
}

func indent(text, by string) string {
	return by + strings.ReplaceAll(text, "\n", "\n"+by)
}

var unknownFlag = regexp.MustCompile(`^unknown flag: --(.+)$`)

// flagError turns pflag's errors into ours.
func flagError(cmd *cobra.Command, err error) error {
	if m := unknownFlag.FindStringSubmatch(err.Error()); m != nil {
		var names []string
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, f.Name)
			}
		})
		message := fmt.Sprintf("%q has no flag --%s", cmd.CommandPath(), m[1])
		if near := config.Nearest(m[1], names); near != "" {
			message += fmt.Sprintf("; did you mean --%s?", near)
		}
		return usageError(errors.New(message))
	}
	return usageError(err)
}

// required makes the error about flags that were not given.
func required(cmd *cobra.Command, flags ...string) error {
	var missing []string
	for _, name := range flags {
		if !cmd.Flags().Changed(name) {
			missing = append(missing, "--"+name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return usageError(fmt.Errorf("%q needs %s", cmd.CommandPath(), strings.Join(missing, " and ")))
}

// exclusive refuses two of the flags in one call.
func exclusive(cmd *cobra.Command, flags ...string) {
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		var given []string
		for _, name := range flags {
			if cmd.Flags().Changed(name) {
				given = append(given, "--"+name)
			}
		}
		switch {
		case len(given) > 1:
			return usageError(fmt.Errorf("%s exclude each other; give one", strings.Join(given, " and ")))
		case before != nil:
			return before(cmd, args)
		}
		return nil
	}
}

// rpcError puts the failure of a call into words: what was attempted, and the
// server's reason.
func rpcError(what string, err error) error {
	if err == nil {
		return nil
	}
	var f *failure
	if errors.As(err, &f) {
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		return fmt.Errorf("%s: %w", what, err)
	}
	out := &failure{code: exitCode(s.Code()), err: fmt.Errorf("%s: %s", what, s.Message())}
	switch s.Code() {
	case codes.Canceled:
		out.err = fmt.Errorf("%s: %w", what, context.Canceled)
	case codes.DeadlineExceeded:
		// Our own deadline, unless the other side says what it waited for.
		if strings.Contains(s.Message(), context.DeadlineExceeded.Error()) {
			out.err = fmt.Errorf("%s: no answer in time", what)
		} else {
			out.code = exitFailed
		}
	case codes.Unimplemented:
		out.err = fmt.Errorf("%s: the other side does not offer this (%s)", what, s.Message())
	}
	return out
}

// itemError is rpcError for one item of a batch.
func itemError(what string, code int32, message string) error {
	return &failure{code: exitCode(codes.Code(code)), err: fmt.Errorf("%s: %s", what, message)}
}

func exitCode(c codes.Code) int {
	switch c {
	case codes.OK:
		return exitOK
	case codes.NotFound:
		return exitNotFound
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnreachable
	}
	return exitFailed
}

// joined makes one error of several: their exit status if it is the same, the
// general one otherwise.
func joined(errs []error) error {
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	code := -1
	for _, err := range errs {
		c := exitFailed
		var f *failure
		if errors.As(err, &f) {
			c = f.code
		}
		if code == -1 {
			code = c
		} else if code != c {
			code = exitFailed
		}
	}
	return &failure{code: code, err: errors.Join(errs...)}
}
