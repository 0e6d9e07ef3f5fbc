# SPDX-License-Identifier: MIT
"""Matrix products on any GPU, from the Python standard library alone (ctypes and the system's Vulkan loader).

    with VulkanGemm() as gpu:
        c = gpu.matmul(a, b)            # lists of rows in, lists of rows out, float32 inside

`python vulkan_gemm.py` lists the devices, checks and times them; `--compile` rebuilds the shipped shader.
The environment variable MICROGPT_VULKAN_DEVICE (a number from that list) chooses a device.

What a GPU program is. The *host* (this Python) finds a *device* and opens it. It asks for *memory* that the
device can reach and puts the inputs there. A *pipeline* is a compiled device program (a *shader*, here
gemm.comp) along with the shape of its arguments; a *descriptor set* says which buffers those arguments are.
The host writes a *command buffer*, a list of jobs ("run this pipeline on so many workgroups"), and submits it
to a *queue*. The device works by itself; a *fence* is the flag it raises at the end; the host waits for that.
Every Vulkan call below is one of those steps. The calls are many because Vulkan hides nothing; each is small.
"""
import base64, ctypes, hashlib, os, re, shutil, struct, subprocess, sys, tempfile, time, zlib
from array import array
from contextlib import ExitStack
from ctypes import addressof, byref, c_char, c_char_p, c_float, c_int32, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p
from itertools import chain, groupby
from operator import mul

TILE = 64          # one workgroup of gemm.comp makes a TILE x TILE block of the result
INVOCATIONS = 256  # and has this many invocations (GPU threads), 16 x 16
MAX_BATCH = 65535  # workgroups along z in one dispatch: the least that every Vulkan device allows


class VulkanError(RuntimeError):
    """Anything that keeps Vulkan from doing its work, in one line. `code` is the VkResult, or None."""

    def __init__(self, message, code=None):
        super().__init__(message)
        self.code = code


# ---- Results ---------------------------------------------------------------------------------------------
# Most Vulkan calls return a VkResult: 0 is success, a negative number is an error. Of the positive ones only
# VK_TIMEOUT can arise here, when a wait ran out of time: a failure, too.

VK_TIMEOUT, VK_ERROR_DEVICE_LOST = 2, -4
RESULT_NAMES = dict(zip(range(-1, -14, -1), """OUT_OF_HOST_MEMORY OUT_OF_DEVICE_MEMORY INITIALIZATION_FAILED
    DEVICE_LOST MEMORY_MAP_FAILED LAYER_NOT_PRESENT EXTENSION_NOT_PRESENT FEATURE_NOT_PRESENT
    INCOMPATIBLE_DRIVER TOO_MANY_OBJECTS FORMAT_NOT_SUPPORTED FRAGMENTED_POOL UNKNOWN""".split()))


def check(call, result):
    if result != 0:
        name = "VK_ERROR_" + RESULT_NAMES[result] if result in RESULT_NAMES else f"VkResult {result}"
        raise VulkanError(f"{call}: {'VK_TIMEOUT' if result == VK_TIMEOUT else name}", result)


# ---- Structures ------------------------------------------------------------------------------------------
# Vulkan takes its arguments in C structures. Each line declares one: its name, its sType if it has one, then
# the specification's field names in the specification's order. sType says which structure this is and pNext
# starts a chain of extensions (unused here); structures with an sType get both in front, sType filled in.
# The letters: u and i are 32-bit integers, q a 64-bit one, z a size_t, p a pointer, s a C string, c a byte,
# and h a handle, the 64-bit name of a Vulkan object (but instances, devices, queues and command buffers are
# pointers). A number after the letter makes an array. VkPhysicalDeviceLimits has 106 fields; those that do
# not matter here (of images, of graphics stages and the like) are folded into a few arrays.

LETTERS = {"u": c_uint32, "i": c_int32, "q": c_uint64, "h": c_uint64, "z": c_size_t, "c": c_char,
           "p": c_void_p, "s": c_char_p}

STRUCTURES = """
VkApplicationInfo 0 pApplicationName:s applicationVersion:u pEngineName:s engineVersion:u apiVersion:u
VkInstanceCreateInfo 1 flags:u pApplicationInfo:p enabledLayerCount:u ppEnabledLayerNames:p
    enabledExtensionCount:u ppEnabledExtensionNames:p
VkDeviceQueueCreateInfo 2 flags:u queueFamilyIndex:u queueCount:u pQueuePriorities:p
VkDeviceCreateInfo 3 flags:u queueCreateInfoCount:u pQueueCreateInfos:p enabledLayerCount:u
    ppEnabledLayerNames:p enabledExtensionCount:u ppEnabledExtensionNames:p pEnabledFeatures:p
VkSubmitInfo 4 waitSemaphoreCount:u pWaitSemaphores:p pWaitDstStageMask:p commandBufferCount:u
    pCommandBuffers:p signalSemaphoreCount:u pSignalSemaphores:p
VkMemoryAllocateInfo 5 allocationSize:q memoryTypeIndex:u
VkFenceCreateInfo 8 flags:u
VkBufferCreateInfo 12 flags:u size:q usage:u sharingMode:u queueFamilyIndexCount:u pQueueFamilyIndices:p
VkShaderModuleCreateInfo 16 flags:u codeSize:z pCode:p
VkPipelineShaderStageCreateInfo 18 flags:u stage:u module:h pName:s pSpecializationInfo:p
VkComputePipelineCreateInfo 29 flags:u stage:VkPipelineShaderStageCreateInfo layout:h basePipelineHandle:h
    basePipelineIndex:i
VkPipelineLayoutCreateInfo 30 flags:u setLayoutCount:u pSetLayouts:p pushConstantRangeCount:u
    pPushConstantRanges:p
VkPushConstantRange stageFlags:u offset:u size:u
VkDescriptorSetLayoutBinding binding:u descriptorType:u descriptorCount:u stageFlags:u pImmutableSamplers:p
VkDescriptorSetLayoutCreateInfo 32 flags:u bindingCount:u pBindings:p
VkDescriptorPoolSize type:u descriptorCount:u
VkDescriptorPoolCreateInfo 33 flags:u maxSets:u poolSizeCount:u pPoolSizes:p
VkDescriptorSetAllocateInfo 34 descriptorPool:h descriptorSetCount:u pSetLayouts:p
VkDescriptorBufferInfo buffer:h offset:q range:q
VkWriteDescriptorSet 35 dstSet:h dstBinding:u dstArrayElement:u descriptorCount:u descriptorType:u
    pImageInfo:p pBufferInfo:p pTexelBufferView:p
VkCommandPoolCreateInfo 39 flags:u queueFamilyIndex:u
VkCommandBufferAllocateInfo 40 commandPool:h level:u commandBufferCount:u
VkCommandBufferBeginInfo 42 flags:u pInheritanceInfo:p
VkMemoryBarrier 46 srcAccessMask:u dstAccessMask:u
VkBufferCopy srcOffset:q dstOffset:q size:q
VkMemoryRequirements size:q alignment:q memoryTypeBits:u
VkQueueFamilyProperties queueFlags:u queueCount:u timestampValidBits:u minImageTransferGranularity:u3
VkMemoryType propertyFlags:u heapIndex:u
VkMemoryHeap size:q flags:u
VkPhysicalDeviceMemoryProperties memoryTypeCount:u memoryTypes:VkMemoryType32 memoryHeapCount:u
    memoryHeaps:VkMemoryHeap16
VkExtensionProperties extensionName:c256 specVersion:u
VkPhysicalDeviceLimits imageLimits:u7 maxStorageBufferRange:u allocationLimits:u3 granularityLimits:q2
    graphicsLimits:u38 maxComputeSharedMemorySize:u maxComputeWorkGroupCount:u3
    maxComputeWorkGroupInvocations:u maxComputeWorkGroupSize:u3 otherLimits:q32
VkPhysicalDeviceProperties apiVersion:u driverVersion:u vendorID:u deviceID:u deviceType:u deviceName:c256
    pipelineCacheUUID:c16 limits:VkPhysicalDeviceLimits sparseProperties:u5
"""


def declare(name, s_type, fields, declared):
    """The ctypes class for one line of the table. A pointer field is given the object it is to point to."""
    pairs = [("sType", c_uint32), ("pNext", c_void_p)] if s_type else []
    for field, kind, length in re.findall(r"(\w+):([A-Za-z]+)(\d*)", fields):
        element = LETTERS.get(kind) or declared[kind]
        pairs.append((field, element * int(length) if length else element))
    pointers = {field for field, kind in pairs if kind is c_void_p}
    defaults = {"sType": int(s_type)} if s_type else {}

    def __init__(self, **values):
        self.pointees = values  # a structure holds bare addresses: keep alive what they point to
        values = {field: addressof(x) if field in pointers else x for field, x in values.items()}
        ctypes.Structure.__init__(self, **values, **defaults)

    return type(name, (ctypes.Structure,), {"_fields_": pairs, "__init__": __init__})


for _name, _s_type, _fields in re.findall(r"(?m)^(Vk\w+)(?: (\d+))?((?:\s+\w+:\w+)+)", STRUCTURES):
    globals()[_name] = declare(_name, _s_type, _fields, globals())

# The values of the specification's enumerations that are used here.
API_VERSION_1_0 = 1 << 22
ENUMERATE_PORTABILITY = 1                                       # VkInstanceCreateFlags
QUEUE_COMPUTE = 2                                               # VkQueueFlags
DEVICE_TYPES = {2: "discrete", 1: "integrated", 3: "virtual", 4: "cpu", 0: "other"}  # in order of preference
DEVICE_LOCAL, HOST_VISIBLE, HOST_COHERENT, HOST_CACHED = 1, 2, 4, 8  # VkMemoryPropertyFlags
TRANSFER_SRC, TRANSFER_DST, STORAGE = 1, 2, 32                  # VkBufferUsageFlags
STORAGE_BUFFER, COMPUTE = 7, 32                                 # VkDescriptorType, VkShaderStageFlags
STAGE_COMPUTE, STAGE_TRANSFER, STAGE_HOST = 0x800, 0x1000, 0x4000  # VkPipelineStageFlags
SHADER_READ, SHADER_WRITE, TRANSFER_READ, TRANSFER_WRITE, HOST_READ = 0x20, 0x40, 0x800, 0x1000, 0x2000


# ---- The loader ------------------------------------------------------------------------------------------
# Vulkan's functions live in one system library, the loader, which passes each call on to the right driver.
# Each line is a function and the letters of its arguments; "=" marks those that return a VkResult.

FUNCTIONS = """
vkEnumerateInstanceExtensionProperties=ppp vkCreateInstance=ppp vkDestroyInstance:pp
vkEnumeratePhysicalDevices=ppp vkGetPhysicalDeviceProperties:pp vkGetPhysicalDeviceMemoryProperties:pp
vkGetPhysicalDeviceQueueFamilyProperties:ppp vkEnumerateDeviceExtensionProperties=pppp
vkCreateDevice=pppp vkDestroyDevice:pp vkGetDeviceQueue:puup
vkCreateBuffer=pppp vkDestroyBuffer:php vkGetBufferMemoryRequirements:php vkAllocateMemory=pppp
vkFreeMemory:php vkBindBufferMemory=phhq vkMapMemory=phqqup
vkCreateShaderModule=pppp vkDestroyShaderModule:php vkCreateDescriptorSetLayout=pppp
vkDestroyDescriptorSetLayout:php vkCreatePipelineLayout=pppp vkDestroyPipelineLayout:php
vkCreateComputePipelines=phuppp vkDestroyPipeline:php vkCreateDescriptorPool=pppp
vkDestroyDescriptorPool:php vkAllocateDescriptorSets=ppp vkUpdateDescriptorSets:pupup
vkCreateCommandPool=pppp vkDestroyCommandPool:php vkAllocateCommandBuffers=ppp
vkBeginCommandBuffer=pp vkEndCommandBuffer=p vkCmdBindPipeline:puh vkCmdBindDescriptorSets:puhuupup
vkCmdPushConstants:phuuup vkCmdDispatch:puuu vkCmdCopyBuffer:phhup vkCmdPipelineBarrier:puuuupupup
vkCreateFence=pppp vkDestroyFence:php vkResetFences=pup vkWaitForFences=pupuq vkQueueSubmit=puph
"""


def open_library():
    """The system's Vulkan loader (on macOS, else MoltenVK itself)."""
    names = {"win32": ["vulkan-1.dll"],
             "darwin": ["libvulkan.1.dylib", "libvulkan.dylib", "libMoltenVK.dylib"]}
    for name in names.get(sys.platform, ["libvulkan.so.1", "libvulkan.so"]):
        try:
            return ctypes.WinDLL(name) if sys.platform == "win32" else ctypes.CDLL(name)
        except OSError:
            continue
    raise VulkanError("no Vulkan loader on this system (install libvulkan1 or the graphics driver)")


class Vulkan:
    """The loader's functions, each with its argument types, and with its VkResult checked if it has one."""

    def __init__(self):
        library = open_library()
        for name, returns, letters in re.findall(r"(\w+)([=:])(\w+)", FUNCTIONS):
            function = getattr(library, name, None)
            if function is None:
                raise VulkanError(f"the Vulkan loader has no {name}")
            function.argtypes = [LETTERS[letter] for letter in letters]
            function.restype = c_int32 if returns == "=" else None
            setattr(self, name, self._checked(name, function) if returns == "=" else function)

    @staticmethod
    def _checked(name, function):
        def call(*arguments):
            result = function(*arguments)
            if result:
                check(name, result)
        return call

    def create(self, kind, device, info):
        """vkCreate<kind>(device, info): the new object's handle."""
        handle = c_uint64()
        getattr(self, "vkCreate" + kind)(device, byref(info), None, byref(handle))
        return handle.value

    @staticmethod
    def array_of(element, function, *arguments):
        """The two-call way in which Vulkan returns arrays: ask for the count, then for the elements."""
        count = c_uint32()
        function(*arguments, byref(count), None)
        elements = (element * count.value)()
        if count.value:
            function(*arguments, byref(count), elements)
        return list(elements[:count.value])


def c_strings(names):
    return (c_char_p * max(1, len(names)))(*names)


# ---- Instance and device ---------------------------------------------------------------------------------
# The instance is this program's connection to Vulkan; through it the physical devices are listed. A device
# has families of queues, and any queue that can compute will do. Drivers that map Vulkan onto another
# interface (MoltenVK on macOS) are hidden unless a program says by a "portability" extension that it expects
# them.

def create_instance(vk):
    offered = {e.extensionName for e in vk.array_of(
        VkExtensionProperties, vk.vkEnumerateInstanceExtensionProperties, None)}
    portability = b"VK_KHR_portability_enumeration" in offered
    wanted = [b"VK_KHR_portability_enumeration", b"VK_KHR_get_physical_device_properties2"]
    names = [name for name in wanted if name in offered] if portability or sys.platform == "darwin" else []
    strings = c_strings(names)
    application = VkApplicationInfo(pApplicationName=b"vulkan_gemm", apiVersion=API_VERSION_1_0)
    info = VkInstanceCreateInfo(
        flags=ENUMERATE_PORTABILITY if portability else 0, pApplicationInfo=application,
        enabledExtensionCount=len(names), ppEnabledExtensionNames=strings)
    instance = c_void_p()
    vk.vkCreateInstance(byref(info), None, byref(instance))
    return instance.value


class PhysicalDevice:
    """What can be asked of a device before opening it."""

    def __init__(self, vk, handle, index):
        self.handle, self.index = handle, index
        properties, self.memory = VkPhysicalDeviceProperties(), VkPhysicalDeviceMemoryProperties()
        vk.vkGetPhysicalDeviceProperties(handle, byref(properties))
        vk.vkGetPhysicalDeviceMemoryProperties(handle, byref(self.memory))
        self.limits = properties.limits
        self.name = properties.deviceName.decode(errors="replace")
        self.kind = DEVICE_TYPES.get(properties.deviceType, "other")
        families = vk.array_of(VkQueueFamilyProperties, vk.vkGetPhysicalDeviceQueueFamilyProperties, handle)
        self.queue_family = next((i for i, f in enumerate(families) if f.queueFlags & QUEUE_COMPUTE), None)
        self.usable = (self.queue_family is not None
                       and self.limits.maxComputeWorkGroupInvocations >= INVOCATIONS)

    def memory_type(self, allowed, size, *preferences):
        """The first memory type with all flags of the first preference that any type meets; None if there is
        none. `allowed` is a bit mask of the types that suit the buffer."""
        for flags in preferences:
            for i, kind in enumerate(self.memory.memoryTypes[:self.memory.memoryTypeCount]):
                fits = size <= self.memory.memoryHeaps[kind.heapIndex].size // 4  # leave room for the others
                if allowed >> i & 1 and kind.propertyFlags & flags == flags and fits:
                    return i
        return None


def list_devices(vk, instance):
    handles = vk.array_of(c_void_p, vk.vkEnumeratePhysicalDevices, instance)
    return [PhysicalDevice(vk, handle, index) for index, handle in enumerate(handles)]


def choose_device(devices):
    """The device that MICROGPT_VULKAN_DEVICE names by its index, else the first of the best kind."""
    wanted = os.environ.get("MICROGPT_VULKAN_DEVICE", "")
    if wanted:
        if not wanted.isdecimal() or int(wanted) >= len(devices):
            raise VulkanError(
                f"MICROGPT_VULKAN_DEVICE={wanted} is out of range: there are {len(devices)} devices")
        device = devices[int(wanted)]
        if not device.usable:
            raise VulkanError(f"MICROGPT_VULKAN_DEVICE={wanted}: {device.name} cannot run the shader")
        return device
    usable = [device for device in devices if device.usable]
    if not usable:
        raise VulkanError("no Vulkan device with a compute queue on this system")
    order = list(DEVICE_TYPES.values())
    return min(usable, key=lambda device: order.index(device.kind))


def create_device(vk, physical):
    extensions = [e.extensionName for e in vk.array_of(
        VkExtensionProperties, vk.vkEnumerateDeviceExtensionProperties, physical.handle, None)]
    names = [name for name in extensions if name == b"VK_KHR_portability_subset"]  # must be on where offered
    strings, priority = c_strings(names), c_float(1.0)
    queue = VkDeviceQueueCreateInfo(queueFamilyIndex=physical.queue_family, queueCount=1,
                                    pQueuePriorities=priority)
    info = VkDeviceCreateInfo(
        queueCreateInfoCount=1, pQueueCreateInfos=queue,
        enabledExtensionCount=len(names), ppEnabledExtensionNames=strings)
    device = c_void_p()
    vk.vkCreateDevice(physical.handle, byref(info), None, byref(device))
    return device.value


# ---- Memory ----------------------------------------------------------------------------------------------
# A buffer is a range of bytes that shaders can use; it is bound to memory of one of the device's types. Where
# the host and the device share memory (integrated and software devices, many discrete ones), one buffer is
# enough: it stays mapped, so that Python writes straight into it. Otherwise there are two: `handle` in the
# device's own memory, and `staging`, which the host sees; commands copy between them. All host memory is
# "coherent": no explicit flushing. Results are wanted "cached", since reading uncached memory is very slow.

class Buffer:
    """A buffer that grows by powers of two and is reused. The host sees it at `address`, and
    through `view`."""

    def __init__(self, vk, device, physical, for_result=False, force_staging=False):
        self.vk, self.device, self.physical = vk, device, physical
        self.for_result, self.force_staging = for_result, force_staging
        self.capacity, self.objects = 0, []  # objects: what free() has to destroy, last first
        self.handle = self.staging = self.address = self.view = None

    def reserve(self, size):
        """Make room for `size` bytes. If that takes a new buffer, what was in the old one is lost."""
        if size <= self.capacity:
            return
        limit = self.physical.limits.maxStorageBufferRange & ~3
        if size > limit:
            raise VulkanError(f"{size} bytes in one buffer are more than the {limit} of {self.physical.name}")
        self.free()
        capacity = min(limit, max(1 << 16, 1 << (size - 1).bit_length()))
        try:
            self._make(capacity)
        except BaseException:
            self.free()  # half made is not made
            raise
        self.capacity = capacity

    def _make(self, size):
        host = HOST_VISIBLE | HOST_COHERENT
        if self.for_result:
            direct, visible = [DEVICE_LOCAL | host | HOST_CACHED], [host | HOST_CACHED, host]
        else:
            direct, visible = [DEVICE_LOCAL | host], [host]
        if self.physical.kind != "discrete":
            direct += visible  # its memory is the host's anyway
        staged = TRANSFER_SRC if self.for_result else TRANSFER_DST
        self.handle = self._create(size, STORAGE | staged)
        if not self.force_staging and self._bind(self.handle, size, direct):
            return
        self.staging = self._create(size, TRANSFER_DST if self.for_result else TRANSFER_SRC)
        if not (self._bind(self.handle, size, [DEVICE_LOCAL, 0]) and self._bind(self.staging, size, visible)):
            raise VulkanError(f"{self.physical.name} has no memory for a buffer of {size} bytes")

    def _create(self, size, usage):
        handle = self.vk.create("Buffer", self.device, VkBufferCreateInfo(size=size, usage=usage))
        self.objects.append((self.vk.vkDestroyBuffer, handle))
        return handle

    def _bind(self, handle, size, preferences):
        """Give the buffer memory of the first type that suits, mapped if for the host; False if none does."""
        needs = VkMemoryRequirements()
        self.vk.vkGetBufferMemoryRequirements(self.device, handle, byref(needs))
        index = self.physical.memory_type(needs.memoryTypeBits, needs.size, *preferences)
        if index is None:
            return False
        info = VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=index)
        memory = c_uint64()
        self.vk.vkAllocateMemory(self.device, byref(info), None, byref(memory))
        self.objects.insert(0, (self.vk.vkFreeMemory, memory.value))  # freed after the buffer, see free()
        self.vk.vkBindBufferMemory(self.device, handle, memory.value, 0)
        if preferences[-1] & HOST_VISIBLE:
            address = c_void_p()
            self.vk.vkMapMemory(self.device, memory.value, 0, size, 0, byref(address))
            self.address = address.value
            self.view = memoryview((c_char * size).from_address(self.address)).cast("B")
        return True

    def free(self):
        self.capacity = 0
        self.handle = self.staging = self.address = self.view = None
        while self.objects:
            destroy, handle = self.objects.pop()
            destroy(self.device, handle, None)


# ---- Lists of rows and bytes -----------------------------------------------------------------------------
# The slow part of a small product is not the arithmetic but turning Python floats into packed 32-bit ones and
# back. One C call moves a whole row: struct.pack_into writes it straight to the device's memory.

def shape_of(rows, name):
    height, width = len(rows), len(rows[0]) if len(rows) else 0
    if not width:
        raise ValueError(f"{name} is empty")
    if any(len(row) != width for row in rows):
        raise ValueError(f"the rows of {name} differ in length")
    return height, width


def write_rows(rows, width, buffer, offset):
    """Pack the rows into the buffer, starting at float number `offset`."""
    if sys.implementation.name == "pypy":  # where a call with hundreds of arguments is slow
        floats = array("f", chain.from_iterable(rows))
        ctypes.memmove(buffer.address + 4 * offset, floats.buffer_info()[0], 4 * len(floats))
        return
    pack_into, view, position = struct.Struct(f"{width}f").pack_into, buffer.view, 4 * offset
    for row in rows:
        pack_into(view, position, *row)
        position += 4 * width


def read_rows(buffer, offset, height, width):
    packed = ctypes.string_at(buffer.address + 4 * offset, 4 * height * width)
    return list(map(list, struct.iter_unpack(f"{width}f", packed)))


# ---- Products --------------------------------------------------------------------------------------------
# Products of the same shape lie one after another in the buffers, so one dispatch makes them all: its third
# dimension counts through them. Different shapes take a dispatch each, all in one command buffer, thus one
# submission: a submission costs as much as a small product. A transposed matrix is never moved: the shader
# is told how far apart neighbours in a row and in a column are, and transposing swaps these two strides.

class Job:
    """`count` products of one shape: where their operands are in the buffers, in floats."""

    def __init__(self, m, n, k, count, a, b, c, transpose_a, transpose_b):
        self.m, self.n, self.k, self.count, self.a, self.b, self.c = m, n, k, count, a, b, c
        self.a_strides = (1, m) if transpose_a else (k, 1)
        self.b_strides = (1, k) if transpose_b else (n, 1)

    def push_constants(self, first):
        """The block of gemm.comp: sizes, then offset, row, column and batch stride of A, of B and of C."""
        m, n, k = self.m, self.n, self.k
        return struct.pack(
            "15I", m, n, k, self.a + first * m * k, *self.a_strides, m * k,
            self.b + first * k * n, *self.b_strides, k * n, self.c + first * m * n, n, 1, m * n)


PUSH_CONSTANT_BYTES = 60


class VulkanGemm:
    """Matrix products on one device; a context manager. Not for use by several threads at once."""

    def __init__(self, timeout=120.0, force_staging=False):
        self.timeout, self.pending, self.closed = timeout, False, False
        self.shader_seconds = 0.0  # how long the last submission took, transfers from and to lists left out
        self._descriptors_stale = True
        self._undo = ExitStack()  # how to free what was made so far, last made first
        try:
            self._open_device()
            self._make_pipeline(load_shader())
            self._make_descriptor_set()
            self._make_commands()
            self.buffers = [Buffer(self.vk, self.device, self.physical, name == "c", force_staging)
                            for name in "abc"]
            for buffer in self.buffers:
                self._undo.callback(buffer.free)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Free everything; does nothing the second time."""
        if self.closed:
            return
        self.closed = True
        try:
            self._wait()  # objects in use must not be freed
        except VulkanError as error:
            if error.code != VK_ERROR_DEVICE_LOST:
                self._undo.pop_all()  # still running after the timeout: better to leak than to crash
        self._undo.close()

    def _create(self, kind, info):
        """Make an object of the device, to be destroyed at close()."""
        handle = self.vk.create(kind, self.device, info)
        self._undo.callback(getattr(self.vk, "vkDestroy" + kind), self.device, handle, None)
        return handle

    # -- Setting up: device, pipeline, descriptor set, command buffer and fence, each once.

    def _open_device(self):
        self.vk = vk = Vulkan()
        self.instance = create_instance(vk)
        self._undo.callback(vk.vkDestroyInstance, self.instance, None)
        self.physical = choose_device(list_devices(vk, self.instance))
        self.device_name = self.physical.name
        self.device = create_device(vk, self.physical)
        self._undo.callback(vk.vkDestroyDevice, self.device, None)
        queue = c_void_p()
        vk.vkGetDeviceQueue(self.device, self.physical.queue_family, 0, byref(queue))
        self.queue = queue.value

    def _make_pipeline(self, spirv):
        """The shader, and the shape of its arguments: three storage buffers and the push constants."""
        bindings = (VkDescriptorSetLayoutBinding * 3)()
        for i in range(3):
            bindings[i] = VkDescriptorSetLayoutBinding(
                binding=i, descriptorType=STORAGE_BUFFER, descriptorCount=1, stageFlags=COMPUTE)
        self.set_layout = self._create("DescriptorSetLayout", VkDescriptorSetLayoutCreateInfo(
            bindingCount=3, pBindings=bindings))
        constants = VkPushConstantRange(stageFlags=COMPUTE, offset=0, size=PUSH_CONSTANT_BYTES)
        self.layout = self._create("PipelineLayout", VkPipelineLayoutCreateInfo(
            setLayoutCount=1, pSetLayouts=c_uint64(self.set_layout),
            pushConstantRangeCount=1, pPushConstantRanges=constants))
        code = (c_uint32 * (len(spirv) // 4)).from_buffer_copy(spirv)
        module = self.vk.create("ShaderModule", self.device, VkShaderModuleCreateInfo(
            codeSize=len(spirv), pCode=code))
        try:
            stage = VkPipelineShaderStageCreateInfo(stage=COMPUTE, module=module, pName=b"main")
            info = VkComputePipelineCreateInfo(stage=stage, layout=self.layout, basePipelineIndex=-1)
            pipeline = c_uint64()
            self.vk.vkCreateComputePipelines(self.device, 0, 1, byref(info), None, byref(pipeline))
        finally:
            self.vk.vkDestroyShaderModule(self.device, module, None)  # the pipeline has its own copy
        self.pipeline = pipeline.value
        self._undo.callback(self.vk.vkDestroyPipeline, self.device, self.pipeline, None)

    def _make_descriptor_set(self):
        size = VkDescriptorPoolSize(type=STORAGE_BUFFER, descriptorCount=3)
        pool = self._create("DescriptorPool", VkDescriptorPoolCreateInfo(
            maxSets=1, poolSizeCount=1, pPoolSizes=size))
        info = VkDescriptorSetAllocateInfo(
            descriptorPool=pool, descriptorSetCount=1, pSetLayouts=c_uint64(self.set_layout))
        descriptor_set = c_uint64()
        self.vk.vkAllocateDescriptorSets(self.device, byref(info), byref(descriptor_set))
        self.descriptor_set = descriptor_set.value

    def _make_commands(self):
        pool = self._create("CommandPool", VkCommandPoolCreateInfo(
            flags=2, queueFamilyIndex=self.physical.queue_family))  # 2: its buffers can be recorded again
        info, commands = VkCommandBufferAllocateInfo(commandPool=pool, commandBufferCount=1), c_void_p()
        self.vk.vkAllocateCommandBuffers(self.device, byref(info), byref(commands))
        self.commands = commands.value
        self.fence = c_uint64(self._create("Fence", VkFenceCreateInfo()))

    # -- One call: lay out, write, record, submit, wait, read.

    def matmul(self, a, b, transpose_a=False, transpose_b=False):
        """op(a) op(b) as a list of rows, where op transposes if asked to."""
        return self.matmuls([a], [b], transpose_a, transpose_b)[0]

    def matmuls(self, a_list, b_list, transpose_a=False, transpose_b=False):
        """The product of each a with its b, of any shapes, all in one submission."""
        if self.closed:
            raise VulkanError("this VulkanGemm is closed")
        if len(a_list) != len(b_list):
            raise ValueError(f"{len(a_list)} left and {len(b_list)} right matrices")
        if not a_list:
            return []
        shapes = [self._shape(a, b, transpose_a, transpose_b) for a, b in zip(a_list, b_list)]
        order = sorted(range(len(shapes)), key=shapes.__getitem__)
        jobs, sizes = [], [0, 0, 0]  # sizes: floats used so far in each buffer
        for (m, n, k), same in groupby(order, key=shapes.__getitem__):
            count = len(list(same))
            jobs.append(Job(m, n, k, count, *sizes, transpose_a, transpose_b))
            sizes = [sizes[0] + count * m * k, sizes[1] + count * k * n, sizes[2] + count * m * n]
        self._wait()  # only after an earlier wait failed: do not write to buffers that are in use
        self._reserve(sizes)
        for matrices, buffer in zip((a_list, b_list), self.buffers):
            offset = 0
            for i in order:
                rows = matrices[i]
                write_rows(rows, len(rows[0]), buffer, offset)
                offset += len(rows) * len(rows[0])
        self._record(jobs, sizes)
        self._submit()
        results, offset = [None] * len(order), 0
        for i in order:
            m, n, _ = shapes[i]
            results[i] = read_rows(self.buffers[2], offset, m, n)
            offset += m * n
        return results

    @staticmethod
    def _shape(a, b, transpose_a, transpose_b):
        """(M, N, K) of a product."""
        (m, k), (k_too, n) = shape_of(a, "a"), shape_of(b, "b")
        m, k = (k, m) if transpose_a else (m, k)
        k_too, n = (n, k_too) if transpose_b else (k_too, n)
        if k != k_too:
            raise ValueError(f"cannot multiply {m} x {k} by {k_too} x {n}")
        return m, n, k

    def _reserve(self, sizes):
        """Grow the buffers if need be, and then tell the descriptor set where they are now."""
        for buffer, size in zip(self.buffers, sizes):
            self._descriptors_stale |= 4 * size > buffer.capacity
            buffer.reserve(4 * size)
        if not self._descriptors_stale:
            return
        infos = (VkDescriptorBufferInfo * 3)(*[
            VkDescriptorBufferInfo(buffer=buffer.handle, range=buffer.capacity) for buffer in self.buffers])
        write = VkWriteDescriptorSet(
            dstSet=self.descriptor_set, dstBinding=0, descriptorCount=3,  # bindings 0, 1 and 2 in a row
            descriptorType=STORAGE_BUFFER, pBufferInfo=infos)
        self.vk.vkUpdateDescriptorSets(self.device, 1, byref(write), 0, None)
        self._descriptors_stale = False

    def _record(self, jobs, sizes):
        vk, commands = self.vk, self.commands
        vk.vkBeginCommandBuffer(commands, byref(VkCommandBufferBeginInfo(flags=1)))  # 1: for one submission
        staged = [(buffer, size) for buffer, size in zip(self.buffers[:2], sizes) if buffer.staging]
        for buffer, size in staged:
            self._copy(buffer.staging, buffer.handle, size)
        if staged:
            self._barrier(STAGE_TRANSFER, TRANSFER_WRITE, STAGE_COMPUTE, SHADER_READ)
        vk.vkCmdBindPipeline(commands, 1, self.pipeline)  # 1: a compute pipeline
        sets = c_uint64(self.descriptor_set)
        vk.vkCmdBindDescriptorSets(commands, 1, self.layout, 0, 1, byref(sets), 0, None)
        for job in jobs:
            self._dispatch(job)
        result = self.buffers[2]
        if result.staging:
            self._barrier(STAGE_COMPUTE, SHADER_WRITE, STAGE_TRANSFER, TRANSFER_READ)
            self._copy(result.handle, result.staging, sizes[2])
            self._barrier(STAGE_TRANSFER, TRANSFER_WRITE, STAGE_HOST, HOST_READ)
        else:
            self._barrier(STAGE_COMPUTE, SHADER_WRITE, STAGE_HOST, HOST_READ)
        vk.vkEndCommandBuffer(commands)

    def _dispatch(self, job):
        for first in range(0, job.count, MAX_BATCH):
            self.vk.vkCmdPushConstants(self.commands, self.layout, COMPUTE, 0, PUSH_CONSTANT_BYTES,
                                       job.push_constants(first))
            self.vk.vkCmdDispatch(self.commands, -(-job.n // TILE), -(-job.m // TILE),
                                  min(MAX_BATCH, job.count - first))

    def _copy(self, source, target, floats):
        self.vk.vkCmdCopyBuffer(self.commands, source, target, 1, byref(VkBufferCopy(size=4 * floats)))

    def _barrier(self, from_stage, from_access, to_stage, to_access):
        """What the first stage wrote is to be complete and visible before the second stage touches it.

        Without this the device may run jobs side by side and keep what they wrote in caches of its own. What
        the host wrote needs none (submitting makes it visible), nor do two dispatches of one submission (they
        write to different parts of C)."""
        barrier = byref(VkMemoryBarrier(srcAccessMask=from_access, dstAccessMask=to_access))
        self.vk.vkCmdPipelineBarrier(self.commands, from_stage, to_stage, 0, 1, barrier, 0, None, 0, None)

    def _submit(self):
        """Hand the command buffer to the device and wait until the fence says that it is done."""
        info = VkSubmitInfo(commandBufferCount=1, pCommandBuffers=c_void_p(self.commands))
        start = time.perf_counter()
        self.vk.vkQueueSubmit(self.queue, 1, byref(info), self.fence)
        self.pending = True
        self._wait()
        self.shader_seconds = time.perf_counter() - start

    def _wait(self):
        if self.pending:
            self.vk.vkWaitForFences(self.device, 1, byref(self.fence), 1, int(self.timeout * 1e9))
            self.vk.vkResetFences(self.device, 1, byref(self.fence))
            self.pending = False


# ---- The shader ------------------------------------------------------------------------------------------
# Vulkan takes shaders as SPIR-V, which glslc or glslangValidator compile from GLSL. This file ships gemm.comp
# compiled, along with the hash of its source: a gemm.comp beside it that was edited is compiled when needed.

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "gemm.comp")


def source_hash():
    """SHA-256 of gemm.comp, whichever way its lines end; None where there is no such file."""
    try:
        with open(SOURCE, "rb") as file:
            return hashlib.sha256(file.read().replace(b"\r\n", b"\n")).hexdigest()
    except FileNotFoundError:
        return None


def compile_shader():
    """gemm.comp as SPIR-V, by whichever compiler there is."""
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "gemm.spv")
        for command in ["glslc", "-O"], ["glslangValidator", "-V"]:
            if shutil.which(command[0]) is None:
                continue
            done = subprocess.run(command + [SOURCE, "-o", output], text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                lines = [line for line in done.stdout.splitlines() if "rror" in line] or ["failed"]
                raise VulkanError(f"{command[0]}: {lines[0]}")
            with open(output, "rb") as file:
                return file.read()
    raise VulkanError("gemm.comp was edited, and compiling it needs glslc or glslangValidator")


def load_shader():
    if source_hash() in (None, SHADER_SHA256):
        return zlib.decompress(base64.b64decode(SHADER_SPIRV))
    return compile_shader()


def rewrite_constants():
    """--compile: put the newly compiled shader and the hash of its source into this file."""
    encoded = base64.b64encode(zlib.compress(compile_shader(), 9)).decode()
    lines = "\n".join(encoded[i:i + 108] for i in range(0, len(encoded), 108))
    with open(__file__, encoding="utf-8", newline="") as file:
        text = file.read()
    text = re.sub(r'(?m)^SHADER_SHA256 = ".*"', f'SHADER_SHA256 = "{source_hash()}"', text)
    text = re.sub(r'(?m)^SHADER_SPIRV = """[^"]*"""', f'SHADER_SPIRV = """\n{lines}\n"""', text)
    with open(__file__, "w", encoding="utf-8", newline="") as file:
        file.write(text)


SHADER_SHA256 = "d93127c2932bf6fdbe8fcf2d040f9949ff9eac33cac72fe4ca63723a2f3a2eed"
SHADER_SPIRV = """
eNp1WGtwVdUVvnvvS0IVSioRUTHhmgKVklSwPngkQiiQ4SVI2qI1QAwqVEUSeWqF4FAUFBQi1JRRXgOoPMYHI6QKzJSxWIQfOjw6U2eqpTgd
x6nMVDTAVLvXXd8yH4eLM9tz93p861tr77XOCcGX5KdSLnV5qmOqVzqV/e9HKR8lqSjLyz5HjJ4wuuzRWVPLfn7zjaL/YSpk7UTXKdU+1S4+
xfXh2ukzRF4W19CoHBlXQcRIZzHlty7xq4pe3TVcqgRPkznI0iTzkLUnWYCsA2SZHHiZHHiZHHiZS+ClIetGsnaQ9ZHaRC/DGxGty7J1S6Wu
w74+PvO+j51ONYBbV+A1JDgLXgO4iP+s+Lz+e53uM7Q/msA/lsA/lgP/GOGfSOCfAL7D/jJ3If7lTm2vBr7tGV9kht/RXYgve66X3BOp17XY
j8T+Guz/jb3E6xy9fJZfyOLL7yujjfCzu9Qlajpjf1XUFWb9lH9h9JBzKYoe3VE3XkXxNmQSsu4XrHQ2lx+gRgOxL4FMuPwYtlKWn2LfA/W2
fU9wF7xe8M2DXp694S/6UvzOQ7xS9Jcj+1tSmqDtK9Bntq+MazDFr0atTF+L/uwW9/dm66Qy2dfF573AFD5TUcs68JH9fZAZ3jTsr4tZ16P+
RbjX9cB5FDVoAI7sZ0FmPOdTHX4PXWfo5bkUeYj+GcTsTDyWY0gZ3krYGO9DxPMo8ZT+OArc44h7DH6yP5Hg2YqZYHEDekJwpX8MV/pC9oLb
wSmGyAZi39G14QpOJrHvi76Sez0EfRnAs9JprYYAT/ZDIbP9SOz7pPKzZ/wrpzXkZbEWRF17cF3mrH/ENy8bQ/qyAveid/YOtstyxSsky6s1
SqQuQ+L/5d7+ApykPuWIM8yp3GxGwEYwzabKqdxsRiGXDOGMdio3m7GwYZw7nMoXRxvZj3MqqySOd8KPOU5wKje/aqcy8Tsbc/yN01zleQa1
bQ1aX8m/ayzKJNJ9QbrChO4U6QoSupOk60A64fTPoJxFt8OpTnKS+VLrdEb1pFrc61T+erSRmVjnFEPkX0ebGmDIf+dkDsTf98RVg1zvyeLn
ZfGnAr8HZovFuM+pzuweILseZDfNqc7qO93peYq8EbLfOsWbTnjfEB7n1upU9xpyO+tUxnfhnNM5Kud3Hjmdp3q2S6uN5Hl7vNjlvq1W3zrV
y9yVWg2G3mol+u/iErngyu9vYkfkk41wcnGfho38XoJcg1f8CvDLh43YLoVNHmwqEzbytBxK0ool2HmIJTwKEjwui/uO8L+MYnRI8CiATUfi
2inBw2wKiEePtGIJdifEsnMt9NqHwtXu65Vez5XvUhevcjuDq7z6dkFOxZST6LrGVQwuXSnetV7vuXAyrCKvcrn7koP5FSMHsenuNabkVQR8
q0GJV/7TUm2160Ey4TeA+AlWr7j6I478tjvdx7fd6fmUf6lXnfVIGfIvpdx+5rVPykjWj/I135u9ylupv27x6n8zuMj79lav7+Rq6Mvx3r3N
q05qNQA59E/sB6B2Yt8zrT69vL5j+mdj5Gff2YO8fj8IP6mj1K0i1kvk4ieY5cAsp7xux71bnujhwVTLesyHlYm71OBUZ3azyI7n0mynOqvb
HMyl2VS3uU7x5hDeSN+Gx2c4yqvO5tJor7LeuCPj6Y6Ibkxc45H7GMprLOHz3LvDq24b8Md5lfVGjQxrPN3rO73ykLqNQ0yxrYZtNfVxPmai
+L8Y1xrqx1971dtMbIbe8hH9xLiagTsRfTuFbITL3XHVwOZu6rF7gG+zaApsamheTYZNZcJmCuXQLa1Ygj0ZsYTH9ASPurjuh38dxbgvwWM6
bO4nrtMSPMxmOvEoSiuWYE9DLLtTD3v9xuhGM3EGzpzv0yNe5XYGM736PoKc5lFOoquPax641FO8WZgRRTQT53qV20w0v3l0d+Z7jSl5zQW+
1eB3XvnzTFxAMuHXRPwEqzGuVYjTSPwWEz/rxae8ykeR3dNe+/Ep6pVnL9Ery73qDG8Farec8J7zirmCZuLzXr//q6G3mbjSq05q1YQcViX2
TTQTi9Pq04iZuIpm4mqvf5tIvlLHBZiJIi/GTFwDzDXE90XcO5uJ1sPSc59Enhl8My/AmTZiZjbSN6Z8q8q3q/i8GuWLSCffql9Atymhk2/V
U9C9lNDJt+pJ6P5AOuHcPq3fraLbBp3dwSVO9RWYKU9Cb3dmCfZPIo9FmMHy98ozTt8r4l+Fb3nh8ix0Zve801qL3TCyWwnd+MhFzqvJqa/8
tyLKxGa1UzvRLYJM8pN8V5NvM3wd+a6FbzP5St2kjmvJdx18PflugO868pXzkPPZQL6b4RvIdyt8N5OvnLOc+1Z6r21D7eenLrwrUutcd2kS
9JMIYwf+pqhI/J1UQ+/UN5zOgyrye9PpN+EbZPc27IaR3W6nc/Jteve24F3emnjn/8mpzuzeJTt+5+91qrO4+/DO30tx9zvF24fv+s8wx87L
v0tF2Uvou5d82/xel+Obdr1X+U7c9w1ec1+P+b2J5qPoNkrfAXsjZstn2G+imbfFt+XG74utXnWW2yuIt5VmyKte83uF8LYRHs/Q7V51hrfD
65lsJ7ydXjF3UC3eyPEue9Or3Hr/LWC9iVq0UC1EtyuuFuQuv+3O7/Y6a1Kptpm9x+u/rVSDj8xSke1GDQ2nhXi/g/jy7WSc9nmVG6eDxEl0
++M6CKz9hHXAa9ztxPM98HTE8y/E8wB4iuw98DTsg4T9V/DM0Nw87FVuPI8TT9Edies4sI7Q+X3oFYfP7yNw/5C4HwV3T9yPEfePwF1kR8Hd
4h0n7L+Be1/i/nevcuN+iriL7uO4TgHrY+L+iVcc5v4puH9C3E+CeyDu/yLun4K7yE6Cu8U7lei5zyjWB057yb7lbwoXzoTP4fM59ft/vPpZ
v5+mXEX3ZVyn4fclYguu7E9Tf/73Ev3+lVed1egM4n1FvL9Gv58hvNZL9PtZrzrDO4fzO0t4571inqN+/zZHv3/nVW7nLgciWN+hFnmhrRai
c3HlIXf5beeZDvrdwf3eLrSd53mcp8jEVmpoOPI03u3Dxf1+eVC5cSokTqLrEFchsDoQVkHQuGfp3l0BntzvnYlnQVCeIrsCPA27kLC7hIv7
/eqgcuNZQjxFd01cJcCS33Z+RUFx+PyKwb2IapwBd+7364l7MbiLLAPuFq+EuPcIF/f7T4LKjXs/4i66G+LqB6wbiHtpUBzmXgbupcT9RnDn
fu9L3MvAXWQ3grvF6xcu7LmbKJdj6PcMvgEaE/1+K3zkaf0+MKif9Xs55Sq6QXGVw28QYjdiL3Lrz8Ehd78PCaqzGlUi3hDiPTRov1cS3rCQ
u9+HB9UZ3gic33DCqwqKOSK09fuocHG/jw4qt3MfAyyRSy0mUC1ENzauCch9LJ3n+KB/g3C/30nnWYXzFNl41NBwJhDvX+bo94lB5capljiJ
7q64aoF1F2HVBI07nHhOBk/u9ynEswY8RTYZPA27lrDrcvT7/UHlxnMm8RTdA3HNBNYDdH4Pot/5/B4C9weJ+wxw535/hLg/BO4imwHuFm8m
YTfk6PfZQeXGfSFxF92cuBYCaw5xfwz9ztwfB/fHiPsT4M79voC4Pw7uInsC3C3ewkTPNVKsf6Df+6LfjyT6fTF8FlO/Px3Uz/p9GeUquqVx
LYPfUsQ+gv0y6s/ll+j3FUF1VqPnEG8F8X4e/f4c4a26RL83BdUZ3gs4vybCWx0U8wXq9xdz9HtzULmd+x+B1YxzX0+1EN3auNYj97V0ni8H
/fcI7vd1dJ6rcZ4iexk1NJz1xHtjjn7fHFRunHYSJ9FtkbME1hbCei1o3CbiuR08ud93EM/XwFNk28HTsHcS9us5+v2toHLjuZd4im5XXHuB
tYvObw/6nc+vBdz3EPd3wJ37/V3i3gLuInsH3C3eXsLen6Pf/xxUbtwPE3fRHYjrMLAOEPeD6Hfm/j64HyTuh8Cd+/0D4v4+uIvsELhbvMOJ
npPn/+IJ3hbX/wF3BcSA
"""


# ---- Which products gain ---------------------------------------------------------------------------------
# A product costs plain Python so long for each multiplication. Here it costs a trip, however small it is, and so
# long for each number that travels. All three are measured once; then each product, or batch of products, goes
# where it is cheaper. Rows may be sparse: one with an attribute `places` is 0 everywhere else, and plain Python
# skips its zeros.

def offload(gpu, plain_matmuls):
    """Return a function of a list of matrices as rows and a list of matrices as columns. It computes their
    products on the GPU if that is faster than plain_matmuls, which does the same."""
    def seconds(product, n):
        a = [[0.1 + 0.01 * (i + j) for i in range(n)] for j in range(n)]
        return min(best_time(lambda: product([a], [a]), at_least=0.0) for _ in range(3))

    def on_gpu(many_rows, many_columns):
        return gpu.matmuls(many_rows, many_columns, transpose_b=True)

    a_term = seconds(plain_matmuls, 32) / 32 ** 3
    a_trip = seconds(on_gpu, 8)
    a_number = (seconds(on_gpu, 192) - a_trip) / (3 * 192 * 192)

    def filled(rows):
        """The share of numbers that are not 0."""
        return 1 - sum(row.count(0.0) for row in rows) / (len(rows) * len(rows[0]))

    def gain(rows, columns):
        """Seconds that a product costs less on the GPU, the trip not counted."""
        m, k, n = len(rows), len(rows[0]), len(columns)
        terms = m * n * k
        if terms * a_term > a_trip:  # only then is it worth counting zeros, which the plain product skips
            terms *= filled(rows) * filled(columns)
        return terms * a_term - (m * k + k * n + m * n) * a_number

    def matmuls(many_rows, many_columns):
        if sum(map(gain, many_rows, many_columns)) < a_trip:
            return plain_matmuls(many_rows, many_columns)
        return on_gpu(many_rows, many_columns)

    return matmuls


# ---- Checks and timings ----------------------------------------------------------------------------------

def plain_matmul(a, b, transpose_a=False, transpose_b=False):
    """The product in plain Python: dot products of rows of op(a) with columns of op(b)."""
    rows = list(zip(*a)) if transpose_a else a
    columns = b if transpose_b else list(zip(*b))
    return [[sum(map(mul, row, column)) for column in columns] for row in rows]


def random_matrix(random, height, width):
    return [[random.uniform(-1.0, 1.0) for _ in range(width)] for _ in range(height)]


def worst_error(got, want):
    """The largest difference, as a part of the largest element."""
    largest = max(abs(x) for row in want for x in row) or 1.0
    return max(abs(x - y) for rows in zip(got, want) for x, y in zip(*rows)) / largest


def check_itself(gpu, random):
    """Awkward shapes, each way of transposing, one by one and as a batch, against plain Python."""
    shapes = [(1, 1, 1), (17, 1, 33), (64, 65, 63), (3, 130, 5), (65, 17, 1), (17, 1, 33)]
    worst = 0.0
    for transpose_a, transpose_b in ((False, False), (True, False), (False, True), (True, True)):
        a_list = [random_matrix(random, *((k, m) if transpose_a else (m, k))) for m, k, n in shapes]
        b_list = [random_matrix(random, *((n, k) if transpose_b else (k, n))) for m, k, n in shapes]
        batch = gpu.matmuls(a_list, b_list, transpose_a, transpose_b)
        for a, b, together in zip(a_list, b_list, batch):
            want = plain_matmul(a, b, transpose_a, transpose_b)
            alone = gpu.matmul(a, b, transpose_a, transpose_b)
            worst = max(worst, worst_error(alone, want), worst_error(together, want))
    if not worst < 1e-4:
        raise VulkanError(f"{gpu.device_name} computes wrong products (error {worst:.1e})")
    return worst


def best_time(function, at_least=0.2, warm_up=True):
    """Seconds of the shortest of several runs."""
    if warm_up:
        function()
    best, start = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        function()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - start > at_least:
            return best


def print_table(gpu, random):
    print("    n   plain Python   GPU, lists  speedup  shader alone  GFLOP/s")
    won, plain_per_term = None, 0.0
    for n in (16, 32, 48, 64, 96, 128, 256, 512, 1024):
        a, b = random_matrix(random, n, n), random_matrix(random, n, n)
        if n <= 512:  # the large ones take seconds: once is enough
            plain = best_time(lambda: plain_matmul(a, b), warm_up=n <= 256)
            plain_per_term = plain / n ** 3
        plain = plain_per_term * n ** 3
        shader = []
        gpu_time = best_time(lambda: (gpu.matmul(a, b), shader.append(gpu.shader_seconds)))
        print(f"{n:5} {plain * 1e3:11.2f} ms{'*' if n > 512 else ' '} {gpu_time * 1e3:9.2f} ms"
              f" {plain / gpu_time:7.1f}x {min(shader) * 1e3:10.2f} ms {2 * n ** 3 / min(shader) / 1e9:8.2f}")
        won = (won or n) if gpu_time < plain else None
    print("(* scaled up from 512)")
    print(f"The GPU wins from n = {won} on." if won else "The GPU does not win at these sizes.")


def print_devices():
    vk = Vulkan()
    instance = create_instance(vk)
    try:
        for device in list_devices(vk, instance):
            usable = "" if device.usable else ", cannot run the shader"
            print(f"device {device.index}: {device.name} ({device.kind}{usable})")
    finally:
        vk.vkDestroyInstance(instance, None)


def main(arguments):
    from random import Random
    try:
        if arguments == ["--compile"]:
            return rewrite_constants()
        if arguments:
            sys.exit("usage: python vulkan_gemm.py [--compile]")
        print_devices()
        with VulkanGemm() as gpu:
            print(f"using {gpu.device_name}; worst relative error {check_itself(gpu, Random(1)):.1e}")
            print_table(gpu, Random(2))
    except VulkanError as error:
        sys.exit(f"vulkan_gemm: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
