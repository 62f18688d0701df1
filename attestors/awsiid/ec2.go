package awsiid

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// DescribeConfig says how the EC2 API is asked. The credentials are those of the
// environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN), or
// those of the role of the EC2 instance that the server is on. They need
// ec2:DescribeInstances and iam:GetInstanceProfile.
type DescribeConfig struct {
	// AssumeRole is the name of a role that there is in each account of
	// account_allow_list, and that the server takes on to ask about an instance
	// of it. Default: the server's own credentials ask, which see one account.
	AssumeRole string `yaml:"assume_role"`
	// DisableInstanceProfileSelectors leaves out the selectors iamrole, and the
	// question to IAM that they take. Default false.
	DisableInstanceProfileSelectors bool `yaml:"disable_instance_profile_selectors"`
	// SkipBlockDevice admits an instance whose root volume was attached more
	// than a minute after its network interface: someone may have changed what is
	// on it elsewhere. Default false.
	SkipBlockDevice bool `yaml:"skip_block_device"`
	// Endpoint is the URL of what takes the place of EC2, IAM and STS: HTTPS, or
	// HTTP on this machine. Default: AWS's own, by region.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// MetadataAddress is the URL of the metadata service that has the server's
	// own credentials, without a path. Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

const (
	maxAnswer    = 1 << 20 // bytes of one of the API's; a large instance's has some 30 KiB
	maxSelectors = 500     // of each kind; EC2 has at most 50 tags and 80 groups
	attachGap    = time.Minute
	ec2Version   = "2016-11-15"
	iamVersion   = "2010-05-08"
	contentType  = "application/x-www-form-urlencoded; charset=utf-8"
)

var roleForm = regexp.MustCompile(`^[A-Za-z0-9+=,.@_-][A-Za-z0-9+=,.@_/-]*$`)

// maxRoleName is the length of a role's name with its path, in bytes.
const maxRoleName = 512

// isRole reports whether a name is that of a role, with its path or without.
func isRole(name string) bool { return len(name) <= maxRoleName && roleForm.MatchString(name) }

// ec2 asks AWS's APIs about an instance.
type ec2 struct {
	c           DescribeConfig
	api         *cloud.Service
	credentials *credentials
	now         func() time.Time
}

func newEC2(c DescribeConfig, now func() time.Time) (*ec2, error) {
	if c.AssumeRole != "" && !isRole(c.AssumeRole) {
		return nil, fmt.Errorf("assume_role is %q; write the role's name, without its ARN", c.AssumeRole)
	}
	if c.Endpoint != "" {
		var err error
		if c.Endpoint, err = cloud.CheckEndpoint(c.Endpoint); err != nil {
			return nil, fmt.Errorf("endpoint: %w", err)
		}
	}
	if c.MetadataAddress == "" {
		c.MetadataAddress = cloud.MetadataAddress
	}
	metadata, err := cloud.Metadata(c.MetadataAddress)
	if err != nil {
		return nil, fmt.Errorf("metadata_address: %w", err)
	}
	e := &ec2{c: c, api: cloud.API(), now: now}
	e.credentials = &credentials{imds: imds{metadata}, now: now, assume: e.assume}
	return e, nil
}

// instance is what the EC2 API says of one.
type instance struct {
	tags   map[string]string
	groups [][2]string // ID and name
	roles  []string    // ARNs
}

func (i *instance) selectors() []string {
	var out []string
	for key, value := range i.tags {
		out = append(out, "tag:"+key+":"+value)
	}
	for _, group := range i.groups {
		out = append(out, "sg:id:"+group[0], "sg:name:"+group[1])
	}
	for _, role := range i.roles {
		out = append(out, "iamrole:"+role)
	}
	return out
}

// described is the answer to DescribeInstances.
type described struct {
	XMLName      xml.Name `xml:"DescribeInstancesResponse"`
	Reservations []struct {
		Owner     string              `xml:"ownerId"`
		Instances []describedInstance `xml:"instancesSet>item"`
	} `xml:"reservationSet>item"`
}

type describedInstance struct {
	ID      string `xml:"instanceId"`
	State   string `xml:"instanceState>name"`
	Profile string `xml:"iamInstanceProfile>arn"`
	Tags    []struct {
		Key   string `xml:"key"`
		Value string `xml:"value"`
	} `xml:"tagSet>item"`
	Groups []struct {
		ID   string `xml:"groupId"`
		Name string `xml:"groupName"`
	} `xml:"groupSet>item"`
	RootType string `xml:"rootDeviceType"`
	RootName string `xml:"rootDeviceName"`
	Devices  []struct {
		Name     string    `xml:"deviceName"`
		Attached time.Time `xml:"ebs>attachTime"`
	} `xml:"blockDeviceMapping>item"`
	Interfaces []struct {
		Index    int       `xml:"attachment>deviceIndex"`
		Attached time.Time `xml:"attachment>attachTime"`
	} `xml:"networkInterfaceSet>item"`
}

// describe asks about a document's instance. The error is for the node if the
// instance is not what it should be, or else an [unavailable].
func (e *ec2) describe(ctx context.Context, d *document) (*instance, error) {
	var answer described
	err := e.ask(ctx, d, "ec2", url.Values{
		"Action": {"DescribeInstances"}, "Version": {ec2Version}, "InstanceId.1": {d.InstanceID},
	}, &answer)
	var refused *apiError
	if errors.As(err, &refused) && strings.HasPrefix(refused.code, "InvalidInstanceID.") {
		return nil, errors.New("instance is gone")
	}
	if err != nil {
		return nil, unavailable{fmt.Errorf("describe the instance %s: %w", d.InstanceID, err)}
	}
	if len(answer.Reservations) != 1 || len(answer.Reservations[0].Instances) != 1 {
		return nil, errors.New("instance is gone")
	}
	of := &answer.Reservations[0].Instances[0]
	switch {
	case of.ID != d.InstanceID || answer.Reservations[0].Owner != d.AccountID:
		return nil, unavailable{fmt.Errorf("EC2 described another instance than %s of the account %s", d.InstanceID, d.AccountID)}
	case of.State != "running" && of.State != "pending":
		return nil, errors.New("instance is not running")
	case len(of.Tags) > maxSelectors || len(of.Groups) > maxSelectors:
		return nil, unavailable{fmt.Errorf("instance %s has more than %d tags or security groups", d.InstanceID, maxSelectors)}
	}
	if !e.c.SkipBlockDevice {
		if err := of.checkRoot(); err != nil {
			return nil, err
		}
	}
	i := &instance{tags: make(map[string]string)}
	for _, tag := range of.Tags {
		i.tags[tag.Key] = tag.Value
	}
	for _, group := range of.Groups {
		i.groups = append(i.groups, [2]string{group.ID, group.Name})
	}
	if of.Profile != "" && !e.c.DisableInstanceProfileSelectors {
		if i.roles, err = e.roles(ctx, d, of.Profile); err != nil {
			return nil, unavailable{fmt.Errorf("roles of the instance %s: %w", d.InstanceID, err)}
		}
	}
	return i, nil
}

// checkRoot checks that the root volume has been there since the instance was made.
func (i *describedInstance) checkRoot() error {
	if i.RootType == "instance-store" {
		return nil // cannot be taken off
	}
	var root, first time.Time
	for _, device := range i.Devices {
		if device.Name == i.RootName {
			root = device.Attached
		}
	}
	for _, one := range i.Interfaces {
		if one.Index == 0 {
			first = one.Attached
		}
	}
	switch {
	case root.IsZero() || first.IsZero():
		return errors.New("it is not known when the instance's root volume and network interface were attached")
	case root.Sub(first).Abs() > attachGap:
		return fmt.Errorf("root volume of the instance was attached %v apart from its network interface; the server's skip_block_device admits it all the same", root.Sub(first).Abs())
	}
	return nil
}

// roles returns those of an instance profile.
func (e *ec2) roles(ctx context.Context, d *document, profile string) ([]string, error) {
	name := profile[strings.LastIndexByte(profile, '/')+1:]
	var answer struct {
		XMLName xml.Name `xml:"GetInstanceProfileResponse"`
		ARN     string   `xml:"GetInstanceProfileResult>InstanceProfile>Arn"`
		Roles   []string `xml:"GetInstanceProfileResult>InstanceProfile>Roles>member>Arn"`
	}
	err := e.ask(ctx, d, "iam", url.Values{
		"Action": {"GetInstanceProfile"}, "Version": {iamVersion}, "InstanceProfileName": {name},
	}, &answer)
	switch {
	case err != nil:
		return nil, err
	case answer.ARN != profile:
		return nil, fmt.Errorf("IAM described another profile than %s", profile)
	case len(answer.Roles) > maxSelectors:
		return nil, fmt.Errorf("the profile has more than %d roles", maxSelectors)
	}
	return answer.Roles, nil
}

// ask asks one of the APIs with the credentials for a document's account.
func (e *ec2) ask(ctx context.Context, d *document, service string, form url.Values, into any) error {
	keys, err := e.credentials.of(ctx, e.c.AssumeRole, d)
	if err != nil {
		return err
	}
	return e.askWith(ctx, keys, d.Region, service, form, into)
}

// apiError is an error that an API answered with.
type apiError struct{ code, message string }

func (e *apiError) Error() string { return e.code + ": " + e.message }

// failure is how the APIs answer with errors: EC2 in the one way, IAM and STS in
// the other.
type failure struct {
	EC2 []apiFailure `xml:"Errors>Error"`
	IAM []apiFailure `xml:"Error"`
}

type apiFailure struct {
	Code    string `xml:"Code"`
	Message string `xml:"Message"`
}

func (e *ec2) askWith(ctx context.Context, keys *keys, region, service string, form url.Values, into any) error {
	endpoint, signed := endpointOf(service, region)
	if e.c.Endpoint != "" {
		endpoint = e.c.Endpoint
	}
	body := form.Encode()
	sum := sha256.Sum256([]byte(body))
	answer, err := e.api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: endpoint + "/", Body: body, Most: maxAnswer,
		Header: map[string]string{"Content-Type": contentType},
		Sign: func(r *http.Request) error {
			return v4.NewSigner().SignHTTP(r.Context(), keys.aws(), r, hex.EncodeToString(sum[:]), service, signed, e.now())
		},
	})
	var status *cloud.StatusError
	if errors.As(err, &status) {
		var f failure
		if xml.Unmarshal(status.Body, &f) == nil {
			for _, one := range append(f.EC2, f.IAM...) {
				return fmt.Errorf("%s answered: %w", service, &apiError{one.Code, one.Message})
			}
		}
	}
	if err != nil {
		return err
	}
	if err := xml.Unmarshal(answer.Body, into); err != nil {
		return fmt.Errorf("%s answered with something else than %s wants: %w", service, form.Get("Action"), err)
	}
	return nil
}

// partitions are AWS's separate clouds: what a region's name begins with, the
// name in ARNs, the domain, and where IAM is.
var partitions = []struct{ prefix, name, domain, iam, iamRegion string }{
	{"cn-", "aws-cn", "amazonaws.com.cn", "iam.cn-north-1.amazonaws.com.cn", "cn-north-1"},
	{"us-gov-", "aws-us-gov", "amazonaws.com", "iam.us-gov.amazonaws.com", "us-gov-west-1"},
	{"eusc-", "aws-eusc", "amazonaws.eu", "iam.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1"},
	{"", "aws", "amazonaws.com", "iam.amazonaws.com", "us-east-1"},
}

// endpointOf returns the URL of a service, and the region to sign for.
func endpointOf(service, region string) (string, string) {
	for _, p := range partitions {
		if !strings.HasPrefix(region, p.prefix) {
			continue
		}
		if service == "iam" {
			return "https://" + p.iam, p.iamRegion
		}
		return "https://" + service + "." + region + "." + p.domain, region
	}
	return "", "" // the last one is for all
}

func partitionOf(region string) string {
	for _, p := range partitions {
		if strings.HasPrefix(region, p.prefix) {
			return p.name
		}
	}
	return "" // the last one is for all
}
